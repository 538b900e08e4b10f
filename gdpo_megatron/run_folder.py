"""The resolved config of a run in its folder, and what has changed since it was started."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gdpo_megatron.config import yaml_text
from gdpo_megatron.config.loader import dump_config
from gdpo_megatron.config.paths import (
    escape_layer,
    expand_layer,
    rebase_layer,
    resolve_path,
)
from gdpo_megatron.config.schema import RLConfig, SFTConfig
from gdpo_megatron.observability.files import write_atomically

CONFIG_FILE = "config.yaml"


def record_config(config: RLConfig | SFTConfig, base_dir: Path) -> list[str]:
    """Write <run_dir>/config.yaml: all keys, paths valid from there, so it can be run again.

    Returns:
        One line for each key that differs from the config recorded there before.
    """
    run_dir = resolve_path(base_dir, config.run_dir)
    path = run_dir / CONFIG_FILE
    data, _ = yaml_text.parse(dump_config(config))
    # The folders in between may have a $ in their names, which is then as literal as the rest.
    expand_layer(data, "", [])
    rebase_layer(data, base_dir, run_dir)
    escape_layer(data)
    changes: list[str] = []
    if path.is_file():
        before = dict(leaves(yaml_text.parse(path.read_text())[0]))
        after = dict(leaves(data))
        changes = [
            f"changed since this run was started: {key}: {before.get(key)} -> {after.get(key)}"
            for key in sorted(before.keys() | after.keys())
            if before.get(key) != after.get(key)
        ]
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(path, yaml_text.dump(data))
    return changes


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of what is at the ends of nested mappings."""
    if isinstance(value, Mapping) and value:
        for key, below in value.items():
            yield from leaves(below, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
