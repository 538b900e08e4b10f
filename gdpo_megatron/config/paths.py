"""Paths in a config: environment variables are filled in; what is relative starts at the file.

Only the keys below are treated as paths; a `$` elsewhere (in a prompt, say) is just a `$`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

PATH_KEYS = (
    "run_dir",
    "model.hf_path",
    "model.tokenizer_path",
    "data.train",
    "data.eval",
    "eval.sets[].data",
)
"""Keys that hold a path."""

FILE_SPEC_KEYS = ("rewards[].type", "eval.rewards[].type", "advantage.estimator")
"""Keys that hold a registered name or ./file.py:function."""

_VARIABLE = re.compile(
    r"\$(?:(?P<dollar>\$)|(?P<bare>[A-Za-z_]\w*)"
    r"|\{(?P<braced>[A-Za-z_]\w*)(?::-(?P<default>[^}]*))?\}|(?P<wrong>))"
)


def resolve_path(base_dir: Path, path: str) -> Path:
    """Give the absolute form of a config's path.

    Args:
        base_dir: folder of the config file.
        path: as written: absolute, from the home folder (~), or relative to `base_dir`.

    Returns:
        An absolute path without "..". A link at its end keeps its own name, for the name may tell
        the format of the file.
    """
    joined = base_dir / Path(path).expanduser()
    return joined.parent.resolve() / joined.name


def expand_variables(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Fill in `$NAME`, `${NAME}` and `${NAME:-default}`; `$$` is a dollar sign.

    As in a shell, `:-` also replaces a variable that is empty.

    Raises:
        ValueError: a variable without default is not set, or a `$` is none of the above.
    """

    def fill(match: re.Match[str]) -> str:
        if match["dollar"]:
            return "$"
        if match["wrong"] is not None:
            raise ValueError("write $NAME, ${NAME}, ${NAME:-default}, or $$ for a dollar sign")
        name = match["bare"] or match["braced"]
        value = environment.get(name)
        if match["default"] is not None:
            return value or match["default"]
        if value is None:
            raise ValueError(f"environment variable {name} is not set")
        return value

    return _VARIABLE.sub(fill, text)


def escape_variables(text: str) -> str:
    """Inverse of `expand_variables` for text that holds no variables."""
    return text.replace("$", "$$")


def expand_layer(layer: dict[str, Any], origin: str, problems: list[str]) -> None:
    """Fill in the variables in the path keys of `layer`, in place.

    Args:
        layer: nested config data.
        origin: put in front of the dotted key in messages.
        problems: gets a line for each that fails.
    """
    for path in PATH_KEYS:
        for holder, name in _strings_at(layer, path):
            try:
                holder[name] = expand_variables(holder[name])
            except ValueError as error:
                problems.append(f"{origin}{path}: {holder[name]!r}: {error}")


def escape_layer(layer: dict[str, Any]) -> None:
    """Inverse of `expand_layer` for a layer that holds no variables, in place."""
    for path in PATH_KEYS:
        for holder, name in _strings_at(layer, path):
            holder[name] = escape_variables(holder[name])


def rebase_layer(layer: dict[str, Any], old_dir: Path, new_dir: Path) -> None:
    """Make the relative paths of a file in `old_dir` hold for a file in `new_dir`, in place."""
    if old_dir.resolve() == new_dir.resolve():
        return

    def rebase(path: str) -> str:
        if Path(path).is_absolute() or path.startswith("~"):
            return path
        return os.path.relpath(old_dir.resolve() / path, new_dir.resolve())

    for path in PATH_KEYS:
        for holder, name in _strings_at(layer, path):
            holder[name] = rebase(holder[name])
    for path in FILE_SPEC_KEYS:
        for holder, name in _strings_at(layer, path):
            file_name, colon, attribute = holder[name].rpartition(":")
            if file_name.endswith(".py"):
                holder[name] = rebase(file_name) + colon + attribute


def _strings_at(data: Any, path: str) -> list[tuple[dict[str, Any], str]]:
    """(mapping, key) for each string at a dotted path; `name[]` goes through a list."""
    holders = _mappings([data])
    *sections, name = path.split(".")
    for section in sections:
        below = [holder.get(section.removesuffix("[]")) for holder in holders]
        if section.endswith("[]"):
            below = [entry for entries in below for entry in _items(entries)]
        holders = _mappings(below)
    return [(holder, name) for holder in holders if isinstance(holder.get(name), str)]


def _mappings(values: list[Any]) -> list[dict[str, Any]]:
    return [value for value in values if isinstance(value, dict)]


def _items(value: Any) -> list[Any]:
    return list(cast("list[Any]", value)) if isinstance(value, list | tuple) else []
