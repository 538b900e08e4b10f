"""The completions of an evaluation set on disk, as they come.

    <folder>/<set>.jsonl            one object per completion
    <folder>/<set>.progress.jsonl   what they were made with; then a line for each whole chunk

A chunk counts when its line is there: it is written after the completions, and says how long their
file is by then. Whatever a kill left behind it is cut off.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gdpo_megatron.errors import InputError

_MAX_DIFFERENCES = 5


class SetStore:
    """One set's files.

    Args:
        folder: of the evaluation.
        name: of the set.
    """

    def __init__(self, folder: Path, name: str):
        self._folder = folder
        self.samples_path = folder / f"{name}.jsonl"
        self._progress_path = folder / f"{name}.progress.jsonl"
        self._chunks: list[dict[str, Any]] = []

    def problems(self, identity: Mapping[str, Any]) -> list[str]:
        """What was made with something else; empty where the evaluation may go on.

        Args:
            identity: what completions and scores depend on, as far as it is known already.
        """
        header, _ = self._read()
        if header is None:
            return []
        before, now = dict(_leaves(header)), dict(_leaves(identity))
        changed = [
            f"{key} {before.get(key, 'not there')}, now {value}"
            for key, value in now.items()
            if before.get(key) != value
        ]
        sections = {key.split(".")[0] for key in now}
        changed += [
            f"{key} {value}, now not there"
            for key, value in before.items()
            if key.split(".")[0] in sections and key not in now
        ]
        if not changed:
            return []
        more = len(changed) - _MAX_DIFFERENCES
        shown = "; ".join(changed[:_MAX_DIFFERENCES]) + (f"; {more} more" if more > 0 else "")
        return [
            f"{self.samples_path} was made with {shown}. Give this evaluation another eval.label, "
            f"or remove {self._folder}"
        ]

    def open(self, identity: Mapping[str, Any], *, goes_on: bool = True) -> int:
        """Make ready to append; returns how many prompts are done.

        Args:
            identity: what completions and scores depend on.
            goes_on: keep what is there; else it is removed.

        Raises:
            InputError: what is there was made with something else, or completions are missing.
        """
        if not goes_on:
            self._progress_path.unlink(missing_ok=True)
        if problems := self.problems(identity):
            raise InputError(problems)
        header, self._chunks = self._read()
        self._folder.mkdir(parents=True, exist_ok=True)
        size = self._chunks[-1]["bytes"] if self._chunks else 0
        there = self.samples_path.stat().st_size if self.samples_path.is_file() else 0
        if there < size:
            raise InputError(
                f"{self.samples_path} is shorter than {self._progress_path.name} says; "
                f"remove {self._folder} to evaluate anew"
            )
        lines = [json.dumps(identity if header is None else header), *map(json.dumps, self._chunks)]
        _write(self._progress_path, "".join(f"{line}\n" for line in lines), at=0)
        _write(self.samples_path, "", at=size)
        return self._chunks[-1]["num_prompts"] if self._chunks else 0

    def append(
        self,
        records: Sequence[Mapping[str, Any]],
        *,
        num_prompts: int,
        events: Mapping[str, Mapping[str, int]],
    ) -> None:
        """Write a chunk; it is on disk when this returns.

        Args:
            records: its completions, in order.
            num_prompts: that are done with it, from the first of the set.
            events: what rewards counted in it, by reward.
        """
        start = self._chunks[-1]["bytes"] if self._chunks else 0
        text = "".join(f"{json.dumps(it, ensure_ascii=False)}\n" for it in records)
        chunk = {
            "num_prompts": num_prompts,
            "bytes": start + _write(self.samples_path, text, at=start),
            "events": {name: dict(sorted(counts.items())) for name, counts in events.items()},
        }
        _write(self._progress_path, json.dumps(chunk) + "\n", at=None)
        self._chunks.append(chunk)

    def records(self) -> Iterator[dict[str, Any]]:
        """All completions, in order."""
        with self.samples_path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)

    def events(self) -> dict[str, dict[str, int]]:
        """What rewards counted in all chunks, by reward."""
        total: dict[str, Counter[str]] = {}
        for chunk in self._chunks:
            for name, counts in chunk["events"].items():
                total.setdefault(name, Counter[str]()).update(counts)
        return {name: dict(sorted(total[name].items())) for name in sorted(total) if total[name]}

    def _read(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """The header and the chunks; of lines that a kill tore, nothing."""
        if not self._progress_path.is_file():
            return None, []
        lines: list[dict[str, Any]] = []
        for line in self._progress_path.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n"):
                break
            lines.append(json.loads(line))
        return (lines[0], lines[1:]) if lines else (None, [])


def _write(path: Path, text: str, *, at: int | None) -> int:
    """Write at a place, cut off what is behind, and wait for the disk; returns the bytes.

    Args:
        path: made if it is not there.
        text: to write.
        at: byte to write at; None appends.
    """
    data = text.encode()
    with path.open("ab") as file:
        if at is not None:
            file.truncate(at)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return len(data)


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, below in value.items():
            yield from _leaves(below, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
