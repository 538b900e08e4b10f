"""Errors that are the user's to fix: shown as plain lines, no traceback, exit code 2."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Bad configuration, data or model folder. Holds one or more problems, each one line."""

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return a hint that names the nearest choice, or all of them when none is near.

    >>> did_you_mean("formt", ["format", "length"])
    "did you mean 'format'?"
    """
    known = sorted(choices)
    near = get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"choices: {', '.join(known) or 'none'}"
