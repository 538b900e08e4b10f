"""The config tree as data: every key with its type in words, its default and its documentation.

The loader reads it to explain what is wrong, `help.py` to explain what is right, so neither can
drift from the dataclasses. A path is dotted; the entries of a list of sections are written
`rewards[]`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache, cached_property
from types import NoneType
from typing import Any, cast, get_args, get_type_hints

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

DERIVED: Mapping[str, str] = {
    "advantage.weights": "the weights have one home: set rewards[].weight",
}
"""Fields that a run fills in itself, and what to set instead; not keys of a config file."""


@dataclass(frozen=True)
class Key:
    """One key of a section."""

    name: str
    hint: Any
    """Its annotation, with pydantic's constraints."""

    description: str | None
    """The string below the field."""

    default: Any
    """A value, or dataclasses.MISSING when the key is required."""

    @property
    def doc(self) -> str:
        """Its documentation on one line: the string below it, else that of its section's class."""
        return " ".join((self.description or (self.section and self.section.__doc__) or "").split())

    @cached_property
    def section(self) -> type | None:
        """The class of the section below this key, also of a list or optional one."""
        candidates = (self.hint, *get_args(self.hint))
        return next((hint for hint in candidates if is_dataclass(hint)), None)  # pyright: ignore

    @property
    def is_list_of_sections(self) -> bool:
        """`rewards: [{...}, {...}]`."""
        return self.section is not None and Ellipsis in get_args(self.hint)

    @property
    def is_optional_section(self) -> bool:
        """A section that may be null."""
        return self.section is not None and NoneType in get_args(self.hint)

    @cached_property
    def is_string(self) -> bool:
        """Holds free text (or null), so a command-line value needs no quotes."""
        if self.section is not None:
            return False
        schema = _json_schema(self.hint)
        return any(
            option.get("type") == "string" and "enum" not in option and "const" not in option
            for option in schema.get("anyOf", [schema])
        )

    @cached_property
    def allowed(self) -> str:
        """Type and range in words: "float > 0", "one of k1, k2, k3", "string, or null"."""
        if self.section is None:
            return _in_words(_json_schema(self.hint))
        words = self.allowed_entry
        if self.is_list_of_sections:
            return f"a list, each entry {words}"
        return f"{words}, or null" if self.is_optional_section else words

    @property
    def allowed_entry(self) -> str:
        """The section below this key, in words."""
        assert self.section is not None
        return f"a section ({', '.join(keys_of(self.section))})"


@cache
def keys_of(section: type) -> dict[str, Key]:
    """The keys of a section by name, in the order of the class."""
    hints = get_type_hints(section, include_extras=True)
    keys: dict[str, Key] = {}
    for entry in fields(section):
        hint, info = hints[entry.name], _field_info(section, entry.name)
        if info.default_factory is not None:
            default = info.get_default(call_default_factory=True, validated_data={})
        else:
            default = MISSING if info.is_required() else info.default
        keys[entry.name] = Key(entry.name, hint, info.description, default)
    return keys


def walk(root: type, prefix: str = "") -> Iterator[tuple[str, Key]]:
    """Every key that a config file may hold, with its dotted path, sections before their keys."""
    for name, key in keys_of(root).items():
        path = prefix + name
        if path in DERIVED:
            continue
        yield path, key
        if key.section is not None:
            yield from walk(key.section, f"{path}[]." if key.is_list_of_sections else f"{path}.")


def _field_info(section: type, name: str) -> FieldInfo:
    """Pydantic's record of a field; an inherited one keeps its docstring only in its own class."""
    infos = [
        cast("dict[str, FieldInfo]", base.__dict__["__pydantic_fields__"])[name]
        for base in section.__mro__
        if name in base.__dict__.get("__pydantic_fields__", {})
    ]
    return next((info for info in infos if info.description), infos[0])


def _json_schema(hint: Any) -> dict[str, Any]:
    return TypeAdapter(hint).json_schema()


def _in_words(schema: Mapping[str, Any]) -> str:
    """Say a JSON schema of a leaf in words."""
    if "anyOf" in schema:
        options = [_in_words(option) for option in schema["anyOf"]]
        return ", or ".join(options)
    if "enum" in schema or "const" in schema:
        choices = [str(choice) for choice in schema.get("enum", [schema.get("const")])]
        return f"one of {', '.join(choices)}"
    kind = schema.get("type")
    if kind == "array":
        items = [_in_words(item) for item in schema.get("prefixItems", [])]
        if not items:
            item = _in_words(schema["items"])
            return f"list of {item}s" if item.isalpha() else f"list, each {item}"
        if len(set(items)) == 1:
            return f"list of {len(items)}, each {items[0]}"
        return f"list of {len(items)}: {', '.join(items)}"
    if kind == "object":
        values = schema.get("additionalProperties")
        if not isinstance(values, dict):
            return "mapping"
        return f"mapping to {_in_words(cast('dict[str, Any]', values))}"
    words = {
        "integer": "int",
        "number": "float",
        "string": "string",
        "boolean": "true or false",
        "null": "null",
    }
    return words.get(str(kind), "any value") + _range_in_words(schema)


def _range_in_words(schema: Mapping[str, Any]) -> str:
    if "minimum" in schema and "maximum" in schema:
        return f" from {schema['minimum']} to {schema['maximum']}"
    signs = {
        "exclusiveMinimum": ">",
        "minimum": ">=",
        "exclusiveMaximum": "<",
        "maximum": "<=",
    }
    bounds = [f"{sign} {schema[name]}" for name, sign in signs.items() if name in schema]
    return " " + " and ".join(bounds) if bounds else ""


def show(value: Any, max_length: int = 60) -> str:
    """Write a value as a config file would, on one line, cut at `max_length` characters.

    >>> show(1e-06), show("fast"), show(None), show((0.9, 0.95))
    ('1e-6', '"fast"', 'null', '[0.9, 0.95]')
    """
    text = json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, float):
        text = re.sub(r"e([+-])0*", lambda match: "e" + match[1].strip("+"), text)
        text = text.replace("Infinity", ".inf").replace("NaN", ".nan")
    return text if len(text) <= max_length else text[: max_length - 3] + "..."
