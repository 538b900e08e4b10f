"""The quickstart's data: the same bytes for a seed, right golds, texts that survive the tokenizer.

Not covered: that a model learns it, which the quickstart itself shows.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from gdpo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from gdpo_megatron.rewards.builtin.tool_call import correctness_reward, format_reward

SCRIPT = Path(__file__).resolve().parents[3] / "examples/quickstart/make_data.py"


@pytest.fixture(scope="module")
def make_data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_make_data", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = sys.modules["quickstart_make_data"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(make_data: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    make_data.make_quickstart_data(folder, 1234)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder / "model")


def read(folder: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_seed_gives_the_same_bytes(make_data: ModuleType, folder: Path, tmp_path: Path):
    make_data.make_quickstart_data(tmp_path / "again", 1234)
    assert contents(tmp_path / "again") == contents(folder)
    make_data.make_quickstart_data(tmp_path / "other", 1)
    assert contents(tmp_path / "other")["eval.jsonl"] != contents(folder)["eval.jsonl"]
    assert sorted(contents(folder)) == [
        "eval.jsonl",
        "model/config.json",
        "model/generation_config.json",
        "model/tokenizer.json",
        "model/tokenizer_config.json",
        "sft.jsonl",
        "train.jsonl",
    ]


def test_golds_earn_the_full_reward(folder: Path):
    for row in read(folder, "train") + read(folder, "eval"):
        assert format_reward(row["answer"], row["answer"]) == 1.0
        assert correctness_reward(row["answer"], row["answer"]) == 3.0


def test_values_are_in_the_request(folder: Path):
    for row in read(folder, "train"):
        request = row["prompt"].splitlines()[0].replace(",", "").split()
        call = json.loads(row["answer"].splitlines()[2])
        assert {str(value) for value in call["parameters"].values()} <= set(request)
        assert f"\n{call['name']}(" in row["prompt"]


def test_eval_is_held_out(folder: Path):
    requests = {
        name: [row["prompt"].splitlines()[0] for row in read(folder, name)]
        for name in ("sft", "train", "eval")
    }
    held_out = set(requests["eval"])
    assert len(held_out) == len(requests["eval"]) == 256
    assert not held_out & set(requests["sft"])
    assert not held_out & set(requests["train"])


def test_sft_answers_are_spoilt_as_said(make_data: ModuleType, folder: Path):
    """Four standard errors of a share are at most 4 * sqrt(0.25 / 16384) = 0.016."""
    rows = read(folder, "sft")
    faults: Counter[str] = Counter()
    for row in rows:
        text = row["completion"]
        body = text[text.index("<tool_call>") :]
        faults["no think"] += not text.startswith("<think>")
        faults["unclosed think"] += text.startswith("<think>") and "</think>" not in text
        faults["unclosed call"] += not body.endswith("</tool_call>")
        faults["format"] += format_reward(text, "<tool_call>") == 1.0
        call = json.loads(body.splitlines()[1])
        # The right tool is the offered one whose parameters these are: names are spoilt alone.
        parameters = make_data.TOOLS[call["name"]].parameters
        faults["surely wrong name"] += list(call["parameters"]) != list(parameters)
    share = {name: number / len(rows) for name, number in faults.items()}
    assert share["no think"] == pytest.approx(0.30, abs=0.016)
    assert share["unclosed think"] == pytest.approx(0.15, abs=0.016)
    assert share["unclosed call"] == pytest.approx(0.15, abs=0.016)
    assert share["format"] == pytest.approx(0.40, abs=0.016)
    assert share["surely wrong name"] == pytest.approx(0.15, abs=0.016)


def test_texts_survive_the_tokenizer_and_are_short(folder: Path, tokenizer: Tokenizer):
    longest: Counter[str] = Counter()
    for name in ("sft", "train", "eval"):
        for row in read(folder, name):
            for key, text in row.items():
                token_ids = tokenizer.encode(text)
                assert token_ids[0] == tokenizer.bos_token_id == 1
                assert tokenizer.decode(token_ids) == text
                longest[key] = max(longest[key], len(token_ids))
    assert longest["prompt"] <= 60
    assert longest["completion"] <= 40 and longest["answer"] <= 40


def test_values_are_one_token(make_data: ModuleType, tokenizer: Tokenizer):
    values = [str(value) for choices in make_data.VALUES.values() for value in choices]
    lengths = {v: len(tokenizer.encode(v, add_special_tokens=False)) for v in values}
    assert {value: length for value, length in lengths.items() if length > 1} == {}


def test_model_config_fits_the_tokenizer(folder: Path, tokenizer: Tokenizer):
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    config = AutoConfig.from_pretrained(folder / "model")
    assert config.vocab_size == tokenizer.vocab_size <= 1024
    assert config.head_dim == 32
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    assert tokenizer.eos_token_id == 2
    assert GenerationConfig.from_pretrained(folder / "model").eos_token_id == 2
    # Embedding and output, per layer 4 h^2 of attention, 3 h f of MLP and two norms, last norm.
    h, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    num_parameters = 2 * config.vocab_size * h + layers * (4 * h * h + 3 * h * f + 2 * h) + h
    assert num_parameters < 2_000_000
    theirs = AutoTokenizer.from_pretrained(folder / "model")
    prompt = read(folder, "eval")[0]["prompt"]
    assert theirs.encode(prompt) == tokenizer.encode(prompt)
