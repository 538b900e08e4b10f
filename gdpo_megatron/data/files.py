"""Rows of a file as they stand in it: one at a time, each with its line, or with what is wrong.

Who reads decides what a bad line means: for a run the file is refused, `data prepare` sets the line
aside and goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gdpo_megatron.data.schema import describe
from gdpo_megatron.errors import InputError, did_you_mean

Fault = Literal["bad_json", "bad_utf8", "bad_unicode", "not_an_object"]
"""How a line can fail to be a row at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRow:
    """A line.

    Args:
        line: of a jsonl file, the number of the row in other files; from 1.
        row: its fields; None where there is a fault.
        fault: None where there is none.
        problem: the fault in words.
        data: the line as it stands, where there is a fault.
        position: bytes (jsonl) or rows of the file that have been read with it.
    """

    line: int
    row: dict[str, Any] | None = None
    fault: Fault | None = None
    problem: str = ""
    data: bytes = b""
    position: int = 0


def read_file(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a jsonl or parquet file; empty lines are counted, but are no rows.

    Raises:
        InputError: no such file, another kind of file, or one that cannot be read.
    """
    check_file(path)
    return READERS[path.suffix](path)


def check_file(path: Path) -> None:
    """Raise InputError where there is no file that `read_file` could begin with."""
    if path.suffix not in READERS:
        raise InputError(f"data file {path}: must be {' or '.join(READERS)}")
    if not path.is_file():
        if not path.parent.is_dir():
            raise InputError(f"data file {path}: there is no folder {path.parent}")
        beside = [file.name for file in path.parent.iterdir() if file.suffix in READERS]
        raise InputError(f"data file {path}: no such file; {did_you_mean(path.name, beside)}")


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    try:
        with path.open("rb") as file:
            position = 0
            for line, data in enumerate(file, start=1):
                position += len(data)
                if data.strip():
                    yield _parse(line, data.rstrip(b"\r\n"), position)
    except OSError as error:
        raise InputError(f"data file {path}: cannot be read: {error.strerror}") from error


def _parse(line: int, data: bytes, position: int) -> RawRow:
    def fault(kind: Fault, problem: str) -> RawRow:
        return RawRow(line=line, fault=kind, problem=problem, data=data, position=position)

    try:
        row = json.loads(data.rstrip())
    except json.JSONDecodeError as error:
        return fault("bad_json", f"bad JSON: {error.msg} (column {error.colno})")
    except UnicodeDecodeError as error:
        return fault("bad_utf8", f"not UTF-8 (byte {error.start + 1} of the line)")
    except (ValueError, RecursionError) as error:
        return fault("bad_json", f"bad JSON: {error}")
    if b"\\ud" in data.lower() and not _is_unicode(row):
        return fault("bad_unicode", "holds half of a surrogate pair (\\ud8xx to \\udfxx)")
    if not isinstance(row, dict):
        return fault("not_an_object", f"must be an object, is {describe(row)}")
    return RawRow(line=line, row=row, position=position)


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        line = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    line += 1
                    yield RawRow(line=line, row=row, position=line)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"data file {path}: no readable parquet file: {error}") from error


READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
