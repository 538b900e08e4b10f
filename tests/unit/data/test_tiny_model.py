"""Models made by code: the tokenizer's rules, the chat format, the config, and the command line.

Not covered: that they learn something (tests/e2e/test_tasks_cpu.py trains some).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from gdpo_megatron.tiny_model import TinyShape, make_tiny_model

TOOL = Path(__file__).resolve().parents[3] / "tools/make_tiny_model.py"
TEXTS = ["The cat sat on the mat in 1984.", '{"name": "find", "parameters": {"city": "Oslo"}}'] * 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    assert make_tiny_model(folder, TEXTS, vocab_size=290) == 290
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def test_the_same_texts_give_the_same_bytes(folder: Path, tmp_path: Path):
    make_tiny_model(tmp_path, TEXTS, vocab_size=290)
    names = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert all((tmp_path / name).read_bytes() == (folder / name).read_bytes() for name in names)


def test_few_texts_give_a_smaller_vocabulary(tmp_path: Path):
    # Three special tokens, 256 bytes, and "ab" and "abab" of the text.
    assert make_tiny_model(tmp_path, ["abab abab"], vocab_size=1000) < 270


@pytest.mark.parametrize(
    "text", ["a  b\n\n c\t", "1984 1,600", "\u00e9\u4e2d\U0001f600", " </think>\n"]
)
def test_any_text_survives(tokenizer: Tokenizer, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_stand_alone(tokenizer: Tokenizer):
    """19 and 1984 begin with the same token, whatever was seen often."""
    for number in ("19", "1984"):
        assert [tokenizer.decode([it]) for it in tokenizer.encode(number)] == list(number)


def test_chats_have_the_format_of_qwen(tokenizer: Tokenizer):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    ids = tokenizer.apply_chat_template(chat)
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    # Special tokens are 0, 1 and 2; the end of a turn ends a completion.
    assert (ids[0], ids.count(1), ids.count(2), tokenizer.eos_token_id) == (1, 3, 2, 2)
    assert tokenizer.special_token_ids == {0, 1, 2}


def test_config_is_a_model_of_transformers(folder: Path):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # Per layer: queries and output 2 x 128 x 128 + 128, keys and values 2 x (128 x 64 + 64), MLP
    # 3 x 128 x 448, two norms; the last norm; embedding, tied.
    layer = 32768 + 128 + 2 * (8192 + 64) + 172032 + 256
    assert model.num_parameters() == 4 * layer + 128 + 290 * 128 == 924_032
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [2, 0]
    arch = load_architecture(folder)
    assert (arch.family, arch.vocab_size, arch.max_position_embeddings) == ("qwen2", 290, 4096)


def test_shape_is_taken(tmp_path: Path):
    shape = TinyShape(hidden_size=64, num_layers=2, intermediate_size=96, max_positions=512)
    make_tiny_model(tmp_path, TEXTS, vocab_size=300, shape=shape)
    arch = load_architecture(tmp_path)
    assert (arch.hidden_size, arch.num_layers, arch.intermediate_size) == (64, 2, 96)
    assert arch.max_position_embeddings == 512


def test_tool_reads_texts_and_rows(tmp_path: Path):
    (tmp_path / "a.txt").write_text("zebra " * 50)
    rows = [{"prompt": [{"role": "user", "content": "quokka " * 50}], "n": 3, "answer": None}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    command = [sys.executable, str(TOOL), "--output", str(tmp_path / "out"), "--vocab-size", "290"]
    files = ["--text-from", str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    done = subprocess.run([*command, *files], capture_output=True, text=True, check=True)
    assert "tokens, 4 layers of 128" in done.stdout
    tokenizer = load_tokenizer(tmp_path / "out")
    assert len(tokenizer.encode(" zebra")) == len(tokenizer.encode(" quokka")) == 1
    # Keys are no texts of the model's.
    assert len(tokenizer.encode(" prompt")) > 1
    missing = subprocess.run(
        [*command, "--text-from", str(tmp_path / "c.txt")], capture_output=True, text=True
    )
    assert missing.returncode == 2 and f"no file {tmp_path / 'c.txt'}" in missing.stderr
