"""A value as JSON that keeps Python's types apart; `values.decode` reads it outside.

JSON's own types are themselves; others are one-entry objects: {"tuple": [...]}, {"dict": [[key,
value], ...]}. Subclasses are taken for what they derive from, so that an object whose __eq__ always
agrees is compared as the list or number that it is. What has no literal form raises TypeError.
"""

from __future__ import annotations

import json
from typing import Any

MAX_DEPTH = 100
_BIG = 1 << 53


def encode(value: Any) -> str:
    """The JSON text; raises TypeError, or RecursionError beyond MAX_DEPTH."""
    return json.dumps(_tagged(value, 0), allow_nan=True, ensure_ascii=True)


def _tagged(value: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise RecursionError("a result is nested too deeply")
    kind = type(value)
    if kind.__module__ == "numpy" and hasattr(kind, "tolist"):
        return _tagged(value.tolist(), depth)
    if value is None or kind is bool:
        return value
    for base, form in _FORMS:
        if issubclass(kind, base):
            return form(value, depth + 1)
    raise TypeError(f"a result of type {kind.__name__} has no literal form")


def _int(value: Any, depth: int) -> Any:
    plain = int.__pos__(value)
    return plain if -_BIG < plain < _BIG else {"int": hex(plain)}


def _many(name: str, base: Any) -> Any:
    def form(value: Any, depth: int) -> Any:
        return {name: [_tagged(item, depth) for item in base.__iter__(value)]}

    return form


_FORMS: tuple[tuple[type, Any], ...] = (
    (int, _int),
    (float, lambda value, depth: float.__pos__(value)),
    (str, lambda value, depth: str.__str__(value)),
    (list, lambda value, depth: [_tagged(item, depth) for item in list.__iter__(value)]),
    (tuple, _many("tuple", tuple)),
    (set, _many("set", set)),
    (frozenset, _many("frozenset", frozenset)),
    (
        dict,
        lambda value, depth: {
            "dict": [[_tagged(k, depth), _tagged(v, depth)] for k, v in dict.items(value)]
        },
    ),
    (complex, lambda value, depth: {"complex": [value.real, value.imag]}),
    (bytes, lambda value, depth: {"bytes": bytes.hex(value)}),
)
