"""A SentencePiece model with Hugging Face files beside it gives what transformers' tokenizer gives.

Both are made from the stories model: one keeps its tokenizer.json and gets two tokens more and a
chat template, the other has the .model file and only the configs of the first. Left out: tokens
that strip spaces around them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdpo_megatron.data.sentencepiece_tokenizer import SentencePieceTokenizer
from gdpo_megatron.data.tokenizer import HuggingFaceTokenizer, load_tokenizer
from gdpo_megatron.errors import InputError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
PARTS = ["<|turn|>", "<tool>", "<s>", "</s>", "Once upon", " a time", "\n", " ", "\u20ac", "<|tu"]

Pair = tuple[HuggingFaceTokenizer, SentencePieceTokenizer]


@pytest.fixture(scope="module")
def pair(stories_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    fast, raw = tmp_path_factory.mktemp("fast"), tmp_path_factory.mktemp("raw")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(stories_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(fast)
    backend = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    config = json.loads((fast / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {
        str(i): {"content": token.content, "special": token.special} for i, token in backend.items()
    }
    shutil.copy(stories_folder / "tokenizer.model", raw)
    (raw / "tokenizer_config.json").write_text(json.dumps(config))
    (raw / "chat_template.jinja").write_text(TEMPLATE)
    made = load_tokenizer(fast), load_tokenizer(raw)
    assert isinstance(made[0], HuggingFaceTokenizer)
    assert isinstance(made[1], SentencePieceTokenizer)
    return made


def test_properties(pair: Pair) -> None:
    for tokenizer in pair:
        assert tokenizer.vocab_size == 514
        assert tokenizer.special_token_ids == {0, 1, 2, 512}
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
        assert tokenizer.has_chat_template
        assert tokenizer.decode([512, 513, 403]) == "<tool> Once"
        assert tokenizer.decode([512, 513, 403], skip_special_tokens=False) == (
            "<|turn|><tool> Once"
        )


@given(parts=st.lists(st.sampled_from(PARTS), max_size=8), begin=st.booleans())
def test_same_ids(pair: Pair, parts: list[str], begin: bool) -> None:
    fast, raw = (t.encode("".join(parts), add_special_tokens=begin) for t in pair)
    assert fast == raw


def test_added_tokens_by_hand(pair: Pair) -> None:
    """A space stands before each part of the text, as the older configs have it."""
    once = pair[1].encode("Once", add_special_tokens=False)
    ids = pair[1].encode("<|turn|>Once<tool>Once")
    assert ids == [1, 512, *once, 513, *once]


def test_no_space_after_added_tokens(pair: Pair, tmp_path: Path) -> None:
    """The newer configs: only a text that begins with text has a space before it."""
    from tokenizers import normalizers, pre_tokenizers

    for path in pair[1].path.parent.iterdir():
        shutil.copy(path, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "legacy": False}))
    raw = load_tokenizer(tmp_path)
    backend: Any = load_tokenizer(pair[0].path)._backend  # pyright: ignore[reportAttributeAccessIssue]
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    for text in (
        "Once",
        "<tool>Once",
        "<tool> Once",
        "Once<tool>Once upon<|turn|>\nOnce",
        "<tool>",
    ):
        assert raw.encode(text) == backend.encode(text).ids, text
    assert raw.encode("<tool>Once") != pair[1].encode("<tool>Once")


def test_chat_template(pair: Pair) -> None:
    messages = [{"role": "user", "content": "Once upon a time"}]
    fast, raw = (tokenizer.apply_chat_template(messages) for tokenizer in pair)
    assert fast == raw
    assert raw[:2] == [1, 512] and raw.count(512) == 2 and raw.count(2) == 1


def test_template_of_the_config(pair: Pair, tmp_path: Path) -> None:
    """Where there is no file of its own; of several, the one called default."""
    shutil.copy(pair[1].path, tmp_path)
    for template in (
        "hi {{ eos_token }}",
        [
            {"name": "tools", "template": "no"},
            {"name": "default", "template": "hi {{ eos_token }}"},
        ],
    ):
        config = {"eos_token": {"content": "</s>"}, "chat_template": template}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = load_tokenizer(tmp_path)
        hi = tokenizer.encode("hi ", add_special_tokens=False)
        # No added tokens: the end token's text is text.
        end = tokenizer.encode("hi </s>", add_special_tokens=False)
        assert tokenizer.apply_chat_template([]) == end and end[:2] == hi[:2]


def test_a_template_that_refuses(pair: Pair, tmp_path: Path) -> None:
    shutil.copy(pair[1].path, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no system prompt') }}")
    with pytest.raises(InputError, match="the chat template refuses it: no system prompt"):
        load_tokenizer(tmp_path).apply_chat_template([{"role": "system", "content": "x"}])


def test_save_carries_everything(pair: Pair, tmp_path: Path) -> None:
    pair[1].save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "tokenizer.model",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (pair[1].path.parent / path.name).read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "[]", "no JSON object: list"),
        ("tokenizer_config.json", "{", "no JSON object: "),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "added tokens cannot be"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template is no text"),
        ("added_tokens.json", '{"<a>": "b"}', "added tokens cannot be read"),
    ],
)
def test_bad_files(name: str, content: str, message: str, pair: Pair, tmp_path: Path) -> None:
    shutil.copy(pair[1].path, tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        load_tokenizer(tmp_path)
