"""docs/data.md names all fields, formats and reasons, and no others."""

from __future__ import annotations

import re
from pathlib import Path

from gdpo_megatron.data.formats import FORMATS, Format
from gdpo_megatron.data.schema import SCHEMA_KEYS
from gdpo_megatron.data.set_aside import REASONS

PAGE = (Path(__file__).resolve().parents[3] / "docs/data.md").read_text()


def table(heading: str) -> list[list[str]]:
    """Cells of the rows of the first table below a heading."""
    text = PAGE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return [line.strip("| ").split(" | ") for line in re.findall(r"^\| `.*\|$", text, re.M)]


def names(rows: list[list[str]], column: int = 0) -> list[str]:
    return [row[column].strip("`") for row in rows]


def test_fields():
    assert set(names(table("The schema"))) == SCHEMA_KEYS


def test_reasons_in_order():
    assert tuple(names(table("What is set aside, and why"))) == REASONS


def test_formats_and_who_checks_their_answers():
    rows = table("Formats")
    assert sorted(names(rows)) == FORMATS.names()
    for name, checked_by in zip(names(rows), names(rows, -1), strict=True):
        reward = Format.of(FORMATS.get(name)).answer_reward
        assert checked_by == (reward or "--check-answers TYPE")
