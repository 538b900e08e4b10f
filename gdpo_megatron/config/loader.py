"""From a YAML file and the command line to a checked, frozen config.

    parent file (`defaults:`)  <-  file  <-  --section.key value ...   each merged over the last
                                     |
                          checked as a whole by pydantic, strictly
                                     |
                 the config, or one InputError that lists every problem in a line

Mappings merge; everything else, lists included, is replaced. On the command line a reward is
addressed by its name: `--rewards.format.weight 0.5`; so is an evaluation set.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import TypeAdapter, ValidationError

from gdpo_megatron.config import yaml_text
from gdpo_megatron.config.explain import explain
from gdpo_megatron.config.fields import DERIVED, Key, keys_of, walk
from gdpo_megatron.config.paths import escape_layer, expand_layer, rebase_layer
from gdpo_megatron.errors import InputError, did_you_mean

T = TypeVar("T")


def load_config(root: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """Read, merge and check a config.

    Args:
        root: the class of the whole config, e.g. RLConfig.
        path: the YAML file. Its folder is where relative paths start, those in `overrides` too;
            paths in a parent file are rewritten to it.
        overrides: command-line words, `--section.key value` or `--section.key=value`. A value is
            YAML, except that a string key takes its value literally. The last one wins.

    Raises:
        InputError: everything that is wrong with the file and the overrides, a line each.
    """
    problems: list[str] = []
    data = _read_layers(path, path.parent, (), problems)
    for name, text in _split_overrides(overrides, problems):
        _apply_override(root, data, name, text, problems)
    problems += _take_derived(data) + _check_names(root, data)
    try:
        config = TypeAdapter(root).validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise InputError(problems + explain(root, data, error)) from error
    if problems:
        raise InputError(problems)
    return config


def dump_config(config: Any) -> str:
    """Write a config, defaults included, as YAML that `load_config` reads back to an equal one.

    Keys stand in the order of the classes. Fields that no file may set are left out.
    """
    data = asdict(config)
    for path in DERIVED:
        section, name = path.split(".")
        data.get(section, {}).pop(name, None)
    escape_layer(data)
    return yaml_text.dump(data)


def _read_layers(
    path: Path, base_dir: Path, children: tuple[Path, ...], problems: list[str]
) -> dict[str, Any]:
    """Read a file over its parents; `children` are the files that led here."""
    if path.resolve() in children:
        chain = " -> ".join(it.name for it in (*children, path))
        raise InputError(f"{children[-1]}: defaults form a circle: {chain}")
    layer = yaml_text.read_mapping(path, problems)
    parent = layer.pop("defaults", None)
    origin = f"{path}: " if children else ""
    expand_layer(layer, origin, problems)
    rebase_layer(layer, path.parent, base_dir)
    if parent is None:
        return layer
    if not isinstance(parent, str):
        raise InputError(f"{path}: defaults: must name a YAML file, got {parent!r}")
    parent_path = path.parent / parent
    if not parent_path.is_file():
        raise InputError(f"{path}: defaults: no file {parent_path}")
    data = _read_layers(parent_path, base_dir, (*children, path.resolve()), problems)
    _merge(data, layer)
    return data


def _merge(data: dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Put `layer` over `data`, in place: mappings merge, everything else is replaced."""
    for name, value in layer.items():
        below = data.get(name)
        if isinstance(below, dict) and isinstance(value, dict):
            _merge(below, value)  # pyright: ignore[reportUnknownArgumentType]
        else:
            data[name] = value


def _split_overrides(words: Sequence[str], problems: list[str]) -> Iterable[tuple[str, str]]:
    """Pair the command-line words: (dotted key, text of the value)."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name:
            problems.append(f"'{word}': expected --section.key value")
        elif equals:
            yield name, text
        elif not rest or rest[0].startswith("--"):
            problems.append(f"--{name}: no value follows (one that begins with --: --{name}=...)")
        else:
            yield name, rest.pop(0)


def _apply_override(
    root: type, data: dict[str, Any], name: str, text: str, problems: list[str]
) -> None:
    """Put one override over `data`, in place. Keys that do not exist are left to the check."""
    parts = name.split(".")
    target, section, above = data, root, list[str]()
    depths = range(1, len(parts))
    depth = next((it for it in depths if _is_list_of_sections(root, parts[:it])), None)
    if depth is not None:
        above, entry, parts = parts[:depth], parts[depth], parts[depth + 1 :]
        key = _find_key(root, above)
        assert key is not None and key.section is not None
        entries = {it["name"]: it for it in _named_entries(_value_at(data, above))}
        if entry not in entries:
            kind, hint = key.name.removesuffix("s"), did_you_mean(entry, entries)
            problems.append(f"--{name}: no {kind} named '{entry}'; {hint}")
            return
        if not parts:
            problems.append(f"--{name}: add one of its keys: {', '.join(keys_of(key.section))}")
            return
        target, section = entries[entry], key.section
    try:
        value = _parse_value(_find_key(section, parts), text)
    except yaml.YAMLError as error:
        problems.append(f"--{name}: {text!r} is not YAML: {yaml_text.describe_error(error)[1]}")
        return
    layer = _nested(parts, value)
    expand_layer(_nested(above, [layer]) if above else layer, "--", problems)
    _merge(target, layer)


def _nested(parts: Sequence[str], value: Any) -> Any:
    """`value` below the sections that a path names."""
    for part in reversed(parts):
        value = {part: value}
    return value


def _value_at(data: Any, parts: Sequence[str]) -> Any:
    """What raw data hold at a path; None where there is nothing."""
    for part in parts:
        data = cast("dict[str, Any]", data).get(part) if isinstance(data, dict) else None
    return data


def _is_list_of_sections(root: type, parts: Sequence[str]) -> bool:
    key = _find_key(root, parts)
    return key is not None and key.is_list_of_sections


def _find_key(section: type | None, parts: Sequence[str]) -> Key | None:
    """The key at a path below `section`; None where the schema does not know it."""
    key = None
    for part in parts:
        key = keys_of(section).get(part) if section is not None else None
        section = key.section if key is not None else None
    return key


def _parse_value(key: Key | None, text: str) -> Any:
    """Read a command-line value as YAML; a string key takes all but null and quotes literally.

    So `--data.prompt_template "Q: {question}"` needs no second pair of quotes.
    """
    try:
        value, found = yaml_text.parse(text)
        if found:
            raise yaml.YAMLError(found[0][1])
    except yaml.YAMLError:
        if key is None or not key.is_string:
            raise
        return text
    if key is not None and key.is_string and not isinstance(value, str | None):
        return text
    return value


def _named_entries(entries: Any) -> list[dict[str, Any]]:
    """The entries of a raw list of sections that have a name; the rest fails the check anyway."""
    if not isinstance(entries, list):
        return []
    mappings: list[Any] = [entry for entry in entries if isinstance(entry, dict)]  # pyright: ignore
    return [entry for entry in mappings if isinstance(entry.get("name"), str)]


def _check_names(root: type, data: Mapping[str, Any]) -> list[str]:
    """Names address entries on the command line and in metrics, so each is a plain word, once."""
    problems: list[str] = []
    for path, key in walk(root):
        if not key.is_list_of_sections:
            continue
        names = [entry["name"] for entry in _named_entries(_value_at(data, path.split(".")))]
        for name in dict.fromkeys(names):
            if names.count(name) > 1:
                problems.append(f"{path}: name '{name}' is used {names.count(name)} times")
            if not name.replace("-", "_").isidentifier():
                problems.append(f"{path}: name '{name}' may only hold letters, digits, _ and -")
    return problems


def _take_derived(data: dict[str, Any]) -> list[str]:
    """Remove the keys that a run fills in itself, and say what to set instead."""
    problems: list[str] = []
    for path, remedy in DERIVED.items():
        section, name = path.split(".")
        holder = data.get(section)
        if isinstance(holder, dict) and name in holder:
            del holder[name]
            problems.append(f"{path}: {remedy}")
    return problems
