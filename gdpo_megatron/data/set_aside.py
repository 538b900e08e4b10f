"""Rows that do not go into the output: why, and as what they are kept."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from gdpo_megatron.data.files import Fault, RawRow

Reason: TypeAlias = (
    Fault
    | Literal[
        "other_task",
        "bad_field",
        "format_failed",
        "empty_prompt",
        "bad_answer",
        "duplicate_id",
        "duplicate_prompt",
        "leak",
        "prompt_too_long",
        "beyond_limit",
    ]
)
"""In the order in which a row meets them; docs/data.md says what each is."""

REASONS: tuple[str, ...] = tuple(
    reason for part in get_args(Reason) for reason in get_args(part) or (part,)
)


class SetAside(Exception):
    """A row does not go into the output."""

    def __init__(self, reason: Reason, detail: str):
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def rejected_line(path: Path, raw: RawRow, why: SetAside) -> bytes:
    """A line of the side file: where a row was, what is wrong with it, and the row.

    What is no row is kept as the text that it is, or, where that is no UTF-8, in base64.
    """
    content: dict[str, Any]
    if raw.row is not None:
        content = {"row": raw.row}
    else:
        try:
            content = {"text": raw.data.decode()}
        except UnicodeDecodeError:
            content = {"base64": base64.b64encode(raw.data).decode()}
    where = {"file": str(path), "line": raw.line, "reason": why.reason, "detail": why.detail}
    # repr: parquet holds what JSON does not. Half surrogates may be in what a message quotes.
    text = json.dumps({**where, **content}, ensure_ascii=False, default=repr)
    return text.encode(errors="backslashreplace") + b"\n"


def in_order(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts by reason, those that occur, in the order of `REASONS`."""
    return {reason: counts[reason] for reason in REASONS if counts.get(reason)}
