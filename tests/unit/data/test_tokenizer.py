"""Both tokenizer kinds agree with each other, with their libraries, and with themselves.

Not covered: tokenizers of published models, which are not at hand; their decoder kinds are.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdpo_megatron.data.sentencepiece_tokenizer import SentencePieceTokenizer
from gdpo_megatron.data.tokenizer import (
    SPACE_SYMBOL,
    HuggingFaceTokenizer,
    IncrementalDecoder,
    Tokenizer,
    load_tokenizer,
)
from gdpo_megatron.errors import InputError

TEXTS = [
    "",
    "Once upon a time",
    " leading, two  spaces\nand a line",
    "trailing ",
    "\n",
    "\u00e9\u20ac\U0001f600 \u4f60\u597d",
    "<think>use x</think>\n<tool_call>\n{}",
]


@pytest.fixture(scope="module", params=["tokenizer.json", "tokenizer.model", "byte_level"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "byte_level":
        return load_tokenizer(request.getfixturevalue("byte_level_folder"))
    folder: Path = request.getfixturevalue("stories_folder")
    return load_tokenizer(folder if request.param == "tokenizer.json" else folder / request.param)


@pytest.fixture(scope="module")
def stories(stories_folder: Path) -> tuple[Tokenizer, Tokenizer]:
    return load_tokenizer(stories_folder), load_tokenizer(stories_folder / "tokenizer.model")


def test_stories_ids_are_the_known_ones(stories: tuple[Tokenizer, Tokenizer]):
    for tokenizer in stories:
        # 1 is the begin token; the ids are those of the llama2.c tokenizer.
        assert tokenizer.encode("Once upon a time") == [1, 403, 407, 261, 378]
        assert tokenizer.encode("Once upon a time", add_special_tokens=False)[0] == 403
        assert tokenizer.encode("") == [1]
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
        assert tokenizer.vocab_size == 512
        assert tokenizer.special_token_ids == {0, 1, 2}
        assert not tokenizer.has_chat_template


def test_kinds_are_told_apart(stories: tuple[Tokenizer, Tokenizer], tmp_path: Path):
    assert isinstance(stories[0], HuggingFaceTokenizer)
    assert isinstance(stories[1], SentencePieceTokenizer)
    shutil.copy(stories[1].path, tmp_path)
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)


@settings(max_examples=200)
@given(text=st.text(max_size=30))
def test_stories_kinds_agree(stories: tuple[Tokenizer, Tokenizer], text: str):
    hf, pieces = stories
    # The names of special tokens are special to one kind and text to the other; both are right.
    if any(name in text for name in ("<s>", "</s>", "<unk>")):
        return
    assert hf.encode(text) == pieces.encode(text)
    # SentencePiece's own sign for a space is a space to both.
    assert pieces.decode(pieces.encode(text)) == text.replace(SPACE_SYMBOL, " ")


@pytest.mark.parametrize("text", TEXTS)
def test_texts_round_trip(tokenizer: Tokenizer, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200)
@given(data=st.data(), skip=st.booleans())
def test_incremental_adds_up_to_decode(tokenizer: Tokenizer, data: st.DataObject, skip: bool):
    # Ids beyond the vocabulary stand for padding rows of a model's embedding.
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    decoder = IncrementalDecoder(tokenizer, skip_special_tokens=skip)
    text = "".join(decoder.feed(i) for i in ids) + decoder.flush()
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)


def _library_decode(tokenizer: Any, ids: list[int], skip: bool) -> str:
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer._hf.decode(ids, skip_special_tokens=skip)
    return tokenizer._model.decode(ids)


@settings(max_examples=200)
@given(data=st.data())
def test_decode_equals_the_library(tokenizer: Tokenizer, data: st.DataObject):
    """Random ids, whole range for byte-level; elsewhere without the 256 byte pieces (see below)."""
    lowest = 0 if tokenizer.path.name.startswith("byte_level") else 259
    ids = data.draw(st.lists(st.integers(lowest, tokenizer.vocab_size - 1), max_size=40))
    assert tokenizer.decode(ids) == _library_decode(tokenizer, ids, skip=True)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        plain = tokenizer.decode(ids, skip_special_tokens=False)
        assert plain == _library_decode(tokenizer, ids, skip=False)


def test_a_shown_character_is_never_taken_back(stories: tuple[Tokenizer, Tokenizer]):
    # Byte pieces: newline, then 0xff, which is no UTF-8. tokenizers turns both into U+FFFD; a stop
    # string "\n" has then already ended the completion.
    newline, bad = 3 + 0x0A, 3 + 0xFF
    assert stories[0]._hf.decode([newline, bad]) == "\ufffd\ufffd"  # pyright: ignore
    for tokenizer in stories:
        decoder = IncrementalDecoder(tokenizer)
        assert decoder.feed(newline) == "\n"
        assert decoder.feed(bad) == "\ufffd"
        assert tokenizer.decode([newline, bad]) == "\n\ufffd"


def test_a_character_appears_with_its_last_byte(stories: tuple[Tokenizer, Tokenizer]):
    for tokenizer in stories:
        decoder = IncrementalDecoder(tokenizer)
        shown = [decoder.feed(3 + byte) for byte in "\u20ac".encode()]
        assert shown == ["", "", "\u20ac"]
        assert decoder.feed(3 + 0xE2) == ""
        assert decoder.flush() == "\ufffd"


def test_the_first_space_goes_once(stories: tuple[Tokenizer, Tokenizer]):
    for tokenizer in stories:
        decoder = IncrementalDecoder(tokenizer)
        assert [decoder.feed(i) for i in (1, 403, 407)] == ["", "Once", " upon"]
        assert tokenizer.decode([1, 403], skip_special_tokens=False) == "<s> Once"


def test_byte_level_properties(byte_level_folder: Path):
    tokenizer = load_tokenizer(byte_level_folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (None, 1)
    assert tokenizer.special_token_ids == {0, 1, 2, 3, 4}
    # Longer than the truncation that the file carries.
    assert tokenizer.decode(tokenizer.encode("the cat sat on the mat")) == "the cat sat on the mat"
    # An added token is its own text, not characters of the byte alphabet.
    added = tokenizer.encode("h\u00e9 llo")
    assert added == [tokenizer.vocab_size - 1]
    assert tokenizer.decode(added) == "h\u00e9 llo"


def test_chat_template(byte_level_folder: Path):
    tokenizer = load_tokenizer(byte_level_folder)
    assert tokenizer.has_chat_template
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "the cat"}])
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text == "<|user|>the cat<eos><|assistant|>"
    with pytest.raises(InputError, match="no tools here"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


def test_no_chat_template(stories: tuple[Tokenizer, Tokenizer]):
    for tokenizer in stories:
        with pytest.raises(InputError, match=f"{tokenizer.path} has no chat template"):
            tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_save_writes_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path / "new")
    tokenizer.save(tmp_path / "new")
    again = load_tokenizer(tmp_path / "new")
    assert type(again) is type(tokenizer)
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
    assert again.special_token_ids == tokenizer.special_token_ids
    again.save(tmp_path / "new")  # onto itself


def test_saved_sentencepiece_loads_in_transformers(stories_folder: Path, tmp_path: Path):
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(stories_folder / "tokenizer.model")
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Once upon a time", "two  spaces\n\u00e9\u20ac"):
        assert theirs.encode(text) == tokenizer.encode(text)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)


def test_add_bos_token_is_read_from_the_config_beside(stories_folder: Path, tmp_path: Path):
    shutil.copy(stories_folder / "tokenizer.model", tmp_path)
    assert load_tokenizer(tmp_path).encode("Once") == [1, 403]
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert load_tokenizer(tmp_path).encode("Once") == [403]
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(InputError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def test_what_is_missing_is_named(tmp_path: Path):
    with pytest.raises(InputError, match="no such folder or file"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(InputError, match=r"no tokenizer\.json, no tokenizer\.model and no vocab"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.txt").write_text("x")
    with pytest.raises(InputError, match=r"SentencePiece \.model"):
        load_tokenizer(tmp_path / "tokenizer.txt")
    (tmp_path / "tokenizer.model").write_text("x")
    with pytest.raises(InputError, match=r"tokenizer\.model: no SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_unknown_decoders_are_refused(byte_level_folder: Path, tmp_path: Path):
    content = json.loads((byte_level_folder / "tokenizer.json").read_text())
    content["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"decoder 'WordPiece' of tokenizer\.json is not"):
        load_tokenizer(tmp_path)


def test_spaces_at_word_ends_are_refused(tmp_path: Path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat"] * 20),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=14,
        treat_whitespace_as_suffix=True,
        minloglevel=2,
    )
    with pytest.raises(InputError, match="spaces at word ends"):
        load_tokenizer(tmp_path)
