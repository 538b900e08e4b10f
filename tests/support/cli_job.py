"""A job's folder, for tests to spoil, and what a command made of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gdpo_megatron.config import yaml_text
from gdpo_megatron.launch import LaunchOptions


@dataclass
class Job:
    """A folder with config.yaml, sft.yaml, rows and a model; everything relative to it.

    Args:
        folder: where it is.
        started: (launch options, worker arguments, unit) of each start.
    """

    folder: Path
    started: list[tuple[LaunchOptions, list[str], str]] = field(default_factory=list)

    def edit(self, changes: Mapping[str, Any], name: str = "config.yaml") -> None:
        """Set dotted keys of a config; None removes one."""
        path = self.folder / name
        data, _ = yaml_text.parse(path.read_text())
        for key, value in changes.items():
            *sections, last = key.split(".")
            holder = data
            for section in sections:
                holder = holder.setdefault(section, {})
            if value is None:
                del holder[last]
            else:
                holder[last] = value
        path.write_text(yaml_text.dump(data))

    def write_rows(self, rows: Sequence[Mapping[str, Any]], name: str = "rows.jsonl") -> None:
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def files(self) -> dict[str, bytes | None]:
        """All that is on disk, folders as None."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(self.folder.rglob("*"))
        }


@dataclass(frozen=True)
class Outcome:
    """What a command said, and how it ended."""

    code: int
    out: str
    err: str


Cli = Callable[..., Outcome]
