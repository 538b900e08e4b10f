"""Fenced code blocks of a Markdown text, in linear time."""

from __future__ import annotations

import re
from dataclasses import dataclass

_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)[^\n`]*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class FencedBlock:
    """Language as written, in lower case ("" where none), and the lines between the fences."""

    language: str
    content: str


def fenced_blocks(text: str) -> list[FencedBlock]:
    """The closed fenced blocks of a text, in order.

    As in CommonMark, a block ends at a fence of the same character, at least as long and without a
    language; what looks like a fence in between is content.
    """
    blocks: list[FencedBlock] = []
    opening: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opening is None:
            opening = fence
        elif fence[1].startswith(opening[1]) and not fence[2]:
            content = text[opening.end() + 1 : fence.start()]
            blocks.append(FencedBlock(opening[2].lower(), content))
            opening = None
    return blocks
