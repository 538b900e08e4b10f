"""One `Tokenizer` over Hugging Face fast tokenizers and raw SentencePiece models.

Encoding is the libraries' work. Decoding is ours and the same for both kinds: each token stands for
a fixed string of bytes, a text is those bytes read as UTF-8. That makes decoding token by token
(`IncrementalDecoder`, for stop strings) exact and constant in time, and `decode` its plain sum.
It equals the libraries' decoding except where a model emits bytes that are no UTF-8: there the
libraries disagree with each other, and one of them takes back characters it has already shown.

`tokenizer.json` is taken as it is written. transformers' AutoTokenizer rebuilds some tokenizers
from their class instead, and then differs from the file (the Llama class drops a leading space).
"""

from __future__ import annotations

import codecs
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gdpo_megatron.data.piece_bytes import read_decoder
from gdpo_megatron.errors import InputError

SPACE_SYMBOL = "\u2581"
"""What SentencePiece writes for a space."""

PIECE_FILE = "tokenizer.model"
_MARK = "\n"  # no piece of a text's words begins with it
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    PIECE_FILE,
)
"""All that a Hugging Face tokenizer folder may consist of."""


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        path: the folder or file it was read from.
        vocab_size: every id is below this; ids may be unused.
        bos_token_id, eos_token_id: None where the tokenizer defines none.
        special_token_ids: ids that are no text (begin, end, padding, unknown, chat markers).
    """

    path: Path
    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int | None
    special_token_ids: frozenset[int]
    _strips_first_space: bool
    """Encoding puts a space before the text, so decoding takes one away."""

    def __init__(self) -> None:
        self._bytes_of: dict[int, bytes] = {}

    @abstractmethod
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`.

        Args:
            text: any text; the empty one has no tokens but special ones.
            add_special_tokens: add what the tokenizer's own configuration puts around a text,
                for most models a begin token or nothing.
        """

    @abstractmethod
    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the text of a conversation, up to where the assistant's turn begins.

        Raises:
            InputError: the tokenizer has no chat template, or its template refuses the messages.
        """

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the token ids of a conversation; see `render_chat`."""
        return self.encode(self.render_chat(messages), add_special_tokens=False)

    @abstractmethod
    def encode_words(self, text: str) -> list[int]:
        """Return the token ids of a text in which the name of a special token is text as well."""

    def encode_further(self, text: str, *, names_are_words: bool = False) -> list[int]:
        """Return the token ids of a text that goes on from other tokens.

        Nothing is put before it, no special token and no space.

        Args:
            text: any text.
            names_are_words: the name of a special token in it is text, see `encode_words`.
        """

        def encode(text: str) -> list[int]:
            if names_are_words:
                return self.encode_words(text)
            return self.encode(text, add_special_tokens=False)

        if not self._strips_first_space:
            return encode(text)
        before, both = encode(_MARK), encode(_MARK + text)
        if both[: len(before)] != before:
            raise ValueError(f"tokenizer {self.path}: {_MARK!r} and {text[:20]!r} become one token")
        return both[len(before) :]

    @property
    @abstractmethod
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can work."""

    @abstractmethod
    def save(self, folder: Path | str) -> None:
        """Write the tokenizer files of a Hugging Face model folder; `folder` is created."""

    @abstractmethod
    def _make_token_bytes(self, token_id: int) -> bytes:
        """Bytes that a token stands for; of a special token the bytes of its name."""

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for.

        An id without a token has no bytes: models pad their vocabulary, and such ids can be drawn.
        """
        data = self._bytes_of.get(token_id)
        if data is None:
            data = self._bytes_of[token_id] = self._make_token_bytes(token_id)
        return data

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `token_ids`; bytes that are no UTF-8 become U+FFFD."""
        skipped = self.special_token_ids if skip_special_tokens else ()
        data = b"".join(self.token_bytes(i) for i in token_ids if i not in skipped)
        if self._strips_first_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", errors="replace")


class IncrementalDecoder:
    """Decodes one completion token by token.

    The texts returned by `feed`, and at last by `flush`, add up to `Tokenizer.decode` of all
    tokens. A character is returned with the token that completes it.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip_next = tokenizer._strips_first_space

    def feed(self, token_id: int) -> str:
        """Return the text that this token completes; empty within a character."""
        if token_id in self._skipped:
            return ""
        data = self._tokenizer.token_bytes(token_id)
        if self._strip_next and data:
            data = data.removeprefix(b" ")
            self._strip_next = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """Return U+FFFD if the tokens ended within a character, else nothing."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load a tokenizer from local files; code that comes with a model is never run.

    Args:
        path: a Hugging Face folder (tokenizer.json, or vocab.json and merges.txt), a folder with a
            SentencePiece tokenizer.model, or a .model file.

    Raises:
        InputError: nothing there, or nothing that is a tokenizer.
    """
    # It builds on this module.
    from gdpo_megatron.data.sentencepiece_tokenizer import SentencePieceTokenizer

    path = Path(path)
    if path.is_file():
        if path.suffix == ".model":
            return SentencePieceTokenizer(path)
        raise InputError(f"tokenizer {path}: neither a folder nor a SentencePiece .model file")
    if not path.is_dir():
        raise InputError(f"tokenizer {path}: no such folder or file")
    if (path / "tokenizer.json").is_file():
        return HuggingFaceTokenizer(path)
    if (path / PIECE_FILE).is_file():
        return SentencePieceTokenizer(path / PIECE_FILE)
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        return HuggingFaceTokenizer(path)
    raise InputError(
        f"tokenizer {path}: the folder has no tokenizer.json, no {PIECE_FILE} and no "
        "vocab.json with merges.txt"
    )


class HuggingFaceTokenizer(Tokenizer):
    """A fast tokenizer of transformers, from a folder."""

    def __init__(self, path: Path):
        super().__init__()
        # transformers takes seconds to import; who needs no tokenizer should not wait for it.
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        self.path = path
        has_file = (path / "tokenizer.json").is_file()
        loader = PreTrainedTokenizerFast if has_file else AutoTokenizer
        try:
            self._hf: Any = loader.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise InputError(f"tokenizer {path}: cannot be read: {one_line(error)}") from error
        if not self._hf.is_fast:
            raise InputError(f"tokenizer {path}: no fast tokenizer, save it with a tokenizer.json")
        self._backend = self._hf.backend_tokenizer
        # A tokenizer.json may carry the padding and truncation of whoever wrote it.
        self._backend.no_truncation()
        self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder()
        self._added = {i: token.content.encode() for i, token in added.items()}
        self.special_token_ids = frozenset(
            {i for i, token in added.items() if token.special} | set(self._hf.all_special_ids)
        )
        self.bos_token_id = self._hf.bos_token_id
        self.eos_token_id = self._hf.eos_token_id
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self._piece_bytes, self._strips_first_space = read_decoder(path, self._backend.decoder)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_words(self, text: str) -> list[int]:
        self._backend.encode_special_tokens = True
        try:
            return self.encode(text, add_special_tokens=False)
        finally:
            self._backend.encode_special_tokens = False

    @property
    def has_chat_template(self) -> bool:
        return self._hf.chat_template is not None

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        if not self.has_chat_template:
            raise no_chat_template(self.path)
        import jinja2

        try:
            return self._hf.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise InputError(f"the chat template refuses it: {one_line(error)}") from error

    def save(self, folder: Path | str) -> None:
        # A copy: written anew, the files would name another tokenizer class than the base model's.
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            source, target = self.path / name, folder / name
            if source.is_file() and not (target.exists() and source.samefile(target)):
                shutil.copyfile(source, target)

    def _make_token_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id]
        piece = self._backend.id_to_token(token_id)
        return b"" if piece is None else self._piece_bytes(piece)


def no_chat_template(path: Path) -> InputError:
    """The error for messages that nothing can render."""
    return InputError(
        f"tokenizer {path} has no chat template; give prompts as strings without "
        "data.system_prompt, or a tokenizer folder with a chat template"
    )


def one_line(error: Exception) -> str:
    """A library's message without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
