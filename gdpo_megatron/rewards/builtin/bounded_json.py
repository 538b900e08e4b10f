"""JSON written by a model, read within bounds: a parser must not be what stops a run."""

from __future__ import annotations

import json
import math
import re
from typing import Any

MAX_CHARS = 1_000_000
MAX_NESTING = 200
"""Python's own bound depends on how deep the caller's stack is."""


def nesting(text: str, allowed: int = MAX_NESTING) -> int:
    """How deep brackets and braces of a JSON text nest; 0 for some that are within `allowed`."""
    if text.count("[") + text.count("{") <= allowed:
        return 0  # cannot be too deep; saves the scan
    depth = deepest = 0
    in_string = False
    for token in re.findall(r'\\.|["\[\]{}]', text, re.DOTALL):
        if token == '"':
            in_string = not in_string
        elif not in_string and token in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif not in_string and token in "]}":
            depth -= 1
    return deepest


def loads(text: str, *, max_nesting: int = MAX_NESTING) -> Any:
    """Parse strict JSON: no NaN, no infinity; 2.0 is the integer 2, as JSON Schema has it.

    Raises:
        ValueError: it is none, or beyond the bounds.
    """
    if len(text) > MAX_CHARS:
        raise ValueError(f"longer than {MAX_CHARS} characters")
    if nesting(text, max_nesting) > max_nesting:
        raise ValueError(f"nested deeper than {max_nesting}")
    return json.loads(text, parse_constant=_refuse, parse_float=_number)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _number(text: str) -> int | float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is beyond a float")
    return int(value) if value.is_integer() else value
