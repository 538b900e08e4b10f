"""YAML as the config files use it: the core schema of YAML 1.2, strings as keys, no key twice.

PyYAML follows YAML 1.1, where `1e-6` is a string, `yes` a boolean, `010` is eight and a second
`lr:` silently wins. Each of these has cost somebody a training run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from gdpo_megatron.errors import InputError, did_you_mean

_TAG = "tag:yaml.org,2002:"
_FLOAT = r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)"
# Tag, what it matches, and the characters it can start with. The first match wins.
_CORE_SCHEMA = [
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", rf"{_FLOAT}|\.(?:nan|NaN|NAN)", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
]


class _Loader(yaml.SafeLoader):
    """Collects `problems` (key twice, key that is no string) instead of stopping at the first."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own class attribute)
    yaml_constructors: dict[str | None, Any] = {  # noqa: RUF012
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_TAG) in {"null", "bool", "str", "seq", "map"}
    }

    def __init__(self, text: str):
        super().__init__(text)
        self.problems: list[tuple[int, str]] = []

    # Checked while composing, since merge keys ("<<") legitimately double keys later.
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first_line: dict[str, int] = {}
        kept: list[tuple[yaml.Node, yaml.Node]] = []
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag not in (_TAG + "str", _TAG + "merge"):
                shown = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                self.problems.append((line, f"key {shown} must be a string; put it in quotes"))
                continue
            kept.append((key, value))
            if key.value in first_line:
                again = f"key '{key.value}' twice, first on line {first_line[key.value]}"
                self.problems.append((line, again))
            else:
                first_line[key.value] = line
        node.value = kept
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or 1.2 readers would take for something else."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: list(entries) for first, entries in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


for _name, _pattern, _first in _CORE_SCHEMA:
    for _class in (_Loader, _Dumper):
        pattern = re.compile(rf"^(?:{_pattern})$")
        _class.add_implicit_resolver(_TAG + _name, pattern, _first)  # pyright: ignore


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value, 0) if node.value.startswith(("0o", "0x")) else int(node.value)


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(re.sub(r"\.(?=inf|nan)", "", node.value.lower()))


def _represent_string(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML breaks lines within single quotes: hard to read, and it loses U+0085.
    style = '"' if len((text + "x").splitlines()) > 1 else None
    return dumper.represent_scalar(_TAG + "str", text, style=style)  # pyright: ignore


_Loader.add_constructor(_TAG + "int", _construct_int)
_Loader.add_constructor(_TAG + "float", _construct_float)
_Dumper.add_representer(str, _represent_string)


def parse(text: str) -> tuple[Any, list[tuple[int, str]]]:
    """Parse one YAML document.

    Returns:
        The value, made of dict, list, str, int, float, bool and None, no two parts shared; and the
        problems that do not keep it from being read, each with its line.

    Raises:
        yaml.YAMLError: it cannot be read.
    """
    loader = _Loader(text)
    try:
        value = loader.get_single_data()
    finally:
        loader.dispose()  # pyright: ignore[reportUnknownMemberType]
    try:
        return json.loads(json.dumps(value)), loader.problems
    except (ValueError, RecursionError) as error:
        raise yaml.YAMLError("an alias (*name) stands inside of what it names") from error


def describe_error(error: yaml.YAMLError) -> tuple[int | None, str]:
    """The line (from 1) of a YAML error where there is one, and its text on one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        text = " ".join(part for part in (error.context, error.problem) if part)
        return error.problem_mark.line + 1, " ".join(text.split())
    return None, " ".join(str(error).split())


def read_mapping(path: Path, problems: list[str]) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping; an empty file is an empty mapping.

    Args:
        path: the file.
        problems: gets a line for each key that stands twice or is no string.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except FileNotFoundError as error:
        beside = [it.name for it in sorted(path.parent.glob("*.y*ml"))]
        hint = f"; {did_you_mean(path.name, beside)}" if beside else ""
        raise InputError(f"no config file {path}{hint}") from error
    except OSError as error:
        raise InputError(f"config file {path}: {error.strerror}") from error
    try:
        value, found = parse(text)
    except yaml.YAMLError as error:
        line, message = describe_error(error)
        where = path if line is None else f"{path}:{line}"
        raise InputError(f"{where}: not valid YAML: {message}") from error
    problems += [f"{path}:{line}: {message}" for line, message in found]
    if value is None:
        return {}
    if not isinstance(value, dict):
        kind = "a list" if isinstance(value, list) else "a single value"
        raise InputError(f"{path}: must hold sections (name: ...), not {kind}")
    return value  # pyright: ignore[reportUnknownVariableType]


def dump(value: Any) -> str:
    """Write plain data as YAML that `parse` reads back to the same value, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
