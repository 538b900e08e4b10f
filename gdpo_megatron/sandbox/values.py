"""Reads the value of a call, which the program under test may have written itself.

Only data can come of it: JSON with tags for Python's other types, bounded in depth and in the
number of hashed entries (many keys with one hash would take quadratic time).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

MAX_DEPTH = 110
MAX_HASHED = 10_000


def decode(text: str) -> Any:
    """The value; raises ValueError for anything that `guest.encode` would not write."""
    try:
        return _plain(json.loads(text), 0)
    except (TypeError, KeyError, RecursionError) as error:  # unhashable entries, unknown tags
        raise ValueError(f"no value: {error}") from error


def _plain(value: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(value, list):
        return [_plain(item, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError("an object with one tag is needed")
    tag, content = next(iter(value.items()))
    if tag in _SCALARS:
        return _SCALARS[tag](content)
    if not isinstance(content, list):
        raise ValueError(f"'{tag}' needs a list")
    items = _plain(content, depth + 1)
    if tag != "tuple" and len(items) > MAX_HASHED:
        raise ValueError(f"'{tag}' of more than {MAX_HASHED} entries")
    return _CONTAINERS[tag](items)


def _int(content: Any) -> int:
    return int(_str(content), 16)


def _str(content: Any) -> str:
    if not isinstance(content, str):
        raise ValueError("text is needed")
    return content


def _complex(content: Any) -> complex:
    real, imaginary = content
    return complex(float(real), float(imaginary))


_SCALARS: dict[str, Callable[[Any], Any]] = {
    "int": _int,
    "complex": _complex,
    "bytes": lambda content: bytes.fromhex(_str(content)),
}
_CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "dict": dict,
}
