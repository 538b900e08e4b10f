"""One row of `gdpo-megatron doctor`, for what finds and what prints alike."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    NOTE = "note"
    """Works without it; something is weaker or smaller than it could be."""
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of the table.

    Args:
        what: what was looked at.
        level: how it is.
        text: what was seen, and what to do about it where something is missing.
    """

    what: str
    level: Level
    text: str
