"""What the pieces of a Hugging Face vocabulary stand for, in bytes.

The decoder section of a tokenizer.json says how pieces become text. Two kinds are in use for
language models: byte-level alphabets (GPT-2, Llama 3, Qwen) and SentencePiece's conventions
(Llama 2, Mistral, Gemma). Both give each piece a fixed string of bytes; other kinds are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gdpo_megatron.errors import InputError

PieceBytes = Callable[[str], bytes]


def read_decoder(path: Path, decoder: Any) -> tuple[PieceBytes, bool]:
    """Translate the decoder section of a tokenizer.json.

    Returns:
        The function from a piece to its bytes, and whether a text's first space is dropped.

    Raises:
        InputError: the decoder is of a kind whose pieces stand for no fixed bytes.
    """
    spec: dict[str, Any] = {"type": "none"}
    if decoder is not None:
        spec = json.loads(decoder.__getstate__())
    steps: list[dict[str, Any]] = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    replacements: list[tuple[str, str]] = []
    byte_level = byte_fallback = strips_first_space = False
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel":
            byte_level = True
        elif kind == "ByteFallback":
            byte_fallback = True
        elif kind == "Replace" and "String" in step["pattern"]:
            replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "Metaspace":
            replacements.append((step["replacement"], " "))
            strips_first_space = step.get("prepend_scheme", "always") != "never"
        elif (kind, step.get("content"), step.get("start"), step.get("stop")) == _STRIP_FIRST_SPACE:
            strips_first_space = True
        elif kind != "Fuse":
            raise InputError(
                f"tokenizer {path}: decoder '{kind}' of tokenizer.json is not supported; "
                "byte-level and SentencePiece-like ones are"
            )

    if byte_level:
        return _byte_level_bytes, strips_first_space

    def piece_bytes(piece: str) -> bytes:
        if byte_fallback and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes.fromhex(match[1])
        for old, new in replacements:
            piece = piece.replace(old, new)
        return piece.encode()

    return piece_bytes, strips_first_space


_STRIP_FIRST_SPACE = ("Strip", " ", 1, 0)
_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    # GPT-2's table: the printable characters of Latin-1 stand for themselves, the other bytes, in
    # order, for the characters from U+0100 on.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_level_alphabet()


def _byte_level_bytes(piece: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in piece)
    except KeyError:  # a marker that was put into the vocabulary as plain text
        return piece.encode()
