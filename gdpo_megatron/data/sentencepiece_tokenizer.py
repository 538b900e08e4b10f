"""A raw SentencePiece model, with what Hugging Face files beside it add.

The .model file knows its pieces. Added tokens, the chat template and whether texts begin with a
begin token stand in the tokenizer_config.json beside it, where there is one. As in transformers,
added tokens are cut out of a text first and the model sees what is between; it puts a space before
each such part (`legacy`), or before a text's beginning alone. Added tokens are looked for in the
text as it is, also those that a config marks `normalized`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gdpo_megatron.data.tokenizer import (
    PIECE_FILE,
    SPACE_SYMBOL,
    Tokenizer,
    no_chat_template,
    one_line,
)
from gdpo_megatron.errors import InputError

_TEMPLATE_FILE = "chat_template.jinja"
_FILES_BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    _TEMPLATE_FILE,
)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file; without added tokens, special ones in a text are text to it."""

    def __init__(self, path: Path):
        super().__init__()
        import sentencepiece

        self.path = path
        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise InputError(
                f"tokenizer {path}: no SentencePiece model: {one_line(error)}"
            ) from error
        model = self._model
        config = _read_object(path.parent / "tokenizer_config.json")
        self._num_pieces: int = model.vocab_size()
        self._read_added_tokens(config)
        self.vocab_size = max(self._num_pieces, *(i + 1 for i in self._added.values()), 0)
        self.bos_token_id = self._id_of(config.get("bos_token"), model.bos_id())
        self.eos_token_id = self._id_of(config.get("eos_token"), model.eos_id())
        self.special_token_ids |= {
            i for i in range(self._num_pieces) if model.is_control(i) or model.is_unknown(i)
        }
        # A .model file does not say whether texts begin with its begin token; without a config that
        # does, Llama's convention: they do.
        self._prefix: list[int] = []
        if self.bos_token_id is not None and config.get("add_bos_token", True):
            self._prefix = [self.bos_token_id]
        self._space_before_each_part = bool(config.get("legacy", True))
        self._chat_template = _read_chat_template(path.parent, config)
        probe = "".join(model.encode("a", out_type=str))
        if probe.endswith(SPACE_SYMBOL):
            raise InputError(f"tokenizer {path}: models with spaces at word ends are not supported")
        self._strips_first_space = probe.startswith(SPACE_SYMBOL)

    def _read_added_tokens(self, config: Mapping[str, Any]) -> None:
        """Tokens that texts are cut at, by their text; those that are special."""
        self._added: dict[str, int] = {}
        special: set[int] = set()
        try:
            for number, token in (config.get("added_tokens_decoder") or {}).items():
                self._added[str(token["content"])] = int(number)
                if token.get("special"):
                    special.add(int(number))
            older = _read_object(self.path.parent / "added_tokens.json")
            self._added |= {text: int(number) for text, number in older.items()}
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise InputError(
                f"tokenizer {self.path.parent}: added tokens cannot be read: {one_line(error)}"
            ) from error
        self.special_token_ids = frozenset(special)
        self._text_of_added = {number: text for text, number in self._added.items()}
        longest_first = sorted(self._added, key=len, reverse=True)
        self._cut = re.compile("|".join(re.escape(text) for text in longest_first))

    def _id_of(self, token: object, default: int) -> int | None:
        """Id of a token that the config names, as a string or {"content": ...}."""
        if isinstance(token, Mapping):
            token = token.get("content")
        if isinstance(token, str):
            piece = self._model.piece_to_id(token)
            number = self._added.get(token, piece if self._is_piece(token) else None)
            if number is not None:
                return number
        return default if default >= 0 else None

    def _is_piece(self, text: str) -> bool:
        return self._model.id_to_piece(self._model.piece_to_id(text)) == text

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = list(self._prefix) if add_special_tokens else []
        if not self._added:
            return ids + self._model.encode(text)
        end = 0
        for match in self._cut.finditer(text):
            ids += self._encode_part(text[end : match.start()], end)
            ids.append(self._added[match.group()])
            end = match.end()
        return ids + self._encode_part(text[end:], end)

    def encode_words(self, text: str) -> list[int]:
        return self._model.encode(text)

    def _encode_part(self, part: str, start: int) -> list[int]:
        """Ids of the text between two added tokens."""
        if not part:
            return []
        if start == 0 or self._space_before_each_part or not self._strips_first_space:
            return self._model.encode(part)
        # As transformers does it: the space goes before a mark, whose pieces are then taken away.
        mark = self._model.id_to_piece(self._model.unk_id())
        return self._model.encode(mark + part)[len(self._model.encode(mark)) :]

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        if self._chat_template is None:
            raise no_chat_template(self.path)
        import jinja2
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template
        named = {"bos_token": self.bos_token_id, "eos_token": self.eos_token_id}
        try:
            (text,), _ = render(
                [[dict(message) for message in messages]],
                chat_template=self._chat_template,
                add_generation_prompt=True,
                **{name: "" if i is None else self._text_of(i) for name, i in named.items()},
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise InputError(f"the chat template refuses it: {one_line(error)}") from error
        return text

    def _text_of(self, token_id: int) -> str:
        return self._text_of_added.get(token_id) or self._model.id_to_piece(token_id)

    def save(self, folder: Path | str) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        beside = [name for name in _FILES_BESIDE if (self.path.parent / name).is_file()]
        for source, name in [(self.path, PIECE_FILE)] + [
            (self.path.parent / name, name) for name in beside
        ]:
            target = folder / name
            if not (target.exists() and source.samefile(target)):
                shutil.copyfile(source, target)
        if "tokenizer_config.json" not in beside:
            config = json.dumps(self._config_for_transformers(), indent=2)
            (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")

    def _config_for_transformers(self) -> dict[str, Any]:
        model = self._model
        named = {
            "bos_token": model.bos_id(),
            "eos_token": model.eos_id(),
            "unk_token": model.unk_id(),
            "pad_token": model.pad_id(),
        }
        return {
            "tokenizer_class": "LlamaTokenizer",
            **{name: model.id_to_piece(i) for name, i in named.items() if i >= 0},
            "add_bos_token": bool(self._prefix),
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "legacy": True,
        }

    def _make_token_bytes(self, token_id: int) -> bytes:
        if token_id in self._text_of_added:
            return self._text_of_added[token_id].encode()
        if not 0 <= token_id < self._num_pieces:
            return b""
        piece = self._model.id_to_piece(token_id)
        if self._model.is_byte(token_id):
            return bytes.fromhex(piece[3:5])
        return piece.replace(SPACE_SYMBOL, " ").encode()


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"tokenizer {path}: no JSON object: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"tokenizer {path}: no JSON object: {type(content).__name__}")
    return content


def _read_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template of the file of its own, else of the config; of several, the default."""
    path = folder / _TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        by_name = {it.get("name"): it.get("template") for it in template if isinstance(it, dict)}
        template = by_name.get("default")
    if template is not None and not isinstance(template, str):
        raise InputError(f"tokenizer {folder / 'tokenizer_config.json'}: chat_template is no text")
    return template
