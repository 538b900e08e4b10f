"""A folder that appears under its name only when it is whole.

    <target>.partial/              where everything is written
    <target>.partial/.journal      one line per finished file: size, checksum, what its writer needs
    <target>/manifest.json         size and SHA-256 of every file, and where it came from

A conversion that was interrupted goes on when it is run again: files of the journal whose bytes
still have their checksum are kept. Another source or other options start over.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from io import RawIOBase
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from gdpo_megatron.errors import InputError

MANIFEST = "manifest.json"
FORMAT = "gdpo-megatron checkpoint 1"

_JOURNAL = ".journal"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_BLOCK = 2**22
# A folder that holds none of these is not a model that --overwrite may replace.
_MODEL_FILES = ("config.json", "metadata.json", MANIFEST)
_PACKAGES = ("gdpo-megatron", "torch", "safetensors", "megatron-core", "transformers")


class HashingStream(RawIOBase):
    """A new file whose SHA-256 is known when it is closed; remembers why a write failed."""

    def __init__(self, path: Path):
        super().__init__()
        self._file: BinaryIO = path.open("wb")
        self._hash = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        # In blocks, so that what is hashed is still in the processor's cache when it is written.
        for start in range(0, len(view), _BLOCK):
            block = view[start : start + _BLOCK]
            self._hash.update(block)
            self._checked(lambda block=block: self._file.write(block))
        self.size += len(view)
        return len(view)

    def _checked(self, operation: Any) -> None:
        # torch's zip writer turns whatever a stream raises into an error of its own.
        try:
            operation()
        except OSError as error:
            self.error = error
            raise

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def fileno(self) -> int:
        return self._file.fileno()

    def flush(self) -> None:
        """Nothing is held back here; `close` puts all of it on the disk."""

    def close(self) -> None:
        """Put the bytes on the disk, not only into the system's cache."""
        if not self.closed:
            try:
                self._checked(self._file.flush)
                self._checked(lambda: os.fsync(self._file.fileno()))
            finally:
                super().close()
                self._file.close()

    def abandon(self) -> None:
        """Close what is not going to be whole."""
        super().close()
        try:
            self._file.close()
        except OSError:
            pass  # its buffer does not fit on the disk either

    def record(self) -> dict[str, Any]:
        """Size and checksum for the manifest."""
        return {"size": self.size, "sha256": self._hash.hexdigest()}


class OutputFolder:
    """Where a checkpoint is written; use as a context manager and end with `publish`.

    Args:
        target: the folder that is to be.
        overwrite: replace an existing model folder, when the new one is whole.
        resume_key: what the content depends on, JSON-able; None means that an earlier attempt is
            of no use and this one leaves nothing behind.

    Raises:
        InputError: the target exists, or is being written by another process.
    """

    def __init__(
        self, target: Path, *, overwrite: bool, resume_key: Mapping[str, Any] | None = None
    ):
        self.target = target
        self.path = target.with_name(target.name + ".partial")
        self.messages: list[str] = []
        """What a person should know of how it began."""
        self._overwrite, self._resume_key = overwrite, resume_key
        self._finished: dict[str, dict[str, Any]] = {}
        self._published = False
        check_target(target, overwrite=overwrite)

    def __enter__(self) -> OutputFolder:
        with self._no_space_is_input():
            self.path.mkdir(parents=True, exist_ok=True)
            self._journal = (self.path / _JOURNAL).open("a+")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._journal.close()
            raise InputError(f"{self.path}: another process is writing it") from error
        with self._no_space_is_input():
            self._resume()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._journal.close()
        # What was refused would be refused again; what was interrupted can go on.
        refused = isinstance(error, InputError) and not isinstance(error, NoSpaceError)
        if not self._published and (refused or not self._finished or self._resume_key is None):
            shutil.rmtree(self.path, ignore_errors=True)
        if error is not None and (cause := no_space(error)) is not None:
            raise self._out_of_space() from cause

    # ---- files -----------------------------------------------------------------------------------

    def finished(self, name: str) -> dict[str, Any] | None:
        """The journal's record of a file that is whole, with what `create` was given."""
        return self._finished.get(name)

    def collected(self, field: str) -> dict[str, Any]:
        """A mapping that each file's record has under `field`, of all files together."""
        return {k: v for record in self._finished.values() for k, v in record[field].items()}

    @contextmanager
    def create(self, name: str, extra: dict[str, Any]) -> Iterator[HashingStream]:
        """Write a file; it counts as finished when the block ends.

        Args:
            name: in the folder.
            extra: JSON-able, kept in the journal as it is when the block ends.
        """
        stream = HashingStream(self.path / name)
        try:
            yield stream
            stream.close()
        except BaseException as error:
            stream.abandon()
            if stream.error is not None and error is not stream.error:
                raise stream.error from error
            raise
        self._finished[name] = {**stream.record(), **extra}
        self._write_journal({"file": name, **self._finished[name]})

    def require_space(self, num_bytes: int) -> None:
        """Refuse to begin what cannot end.

        Args:
            num_bytes: of the whole checkpoint; finished files are taken off.

        Raises:
            InputError: the disk has less left.
        """
        needed = num_bytes - sum(record["size"] for record in self._finished.values())
        free = shutil.disk_usage(self.path).free
        if needed > free:
            if not self._finished:
                shutil.rmtree(self.path, ignore_errors=True)
            raise NoSpaceError(
                f"{self.target}: needs {needed:,} more bytes, {free:,} are free on its disk"
            )

    def publish(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """Write the manifest and give the folder its name.

        Args:
            about: JSON-able facts for the manifest.

        Returns:
            The manifest.
        """
        (self.path / _JOURNAL).unlink()
        files = {}
        for path in sorted(p for p in self.path.rglob("*") if p.is_file()):
            name = path.relative_to(self.path).as_posix()
            known = self._finished.get(name)
            files[name] = (
                {key: known[key] for key in ("size", "sha256")} if known else checksum(path)
            )
        manifest = {"format": FORMAT, **about, "versions": _versions(), "files": files}
        with (self.path / MANIFEST).open("w") as stream:
            stream.write(json.dumps(manifest, indent=2) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        _sync_folder(self.path)
        replaced = self.target.with_name(self.target.name + ".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if self.target.exists():
            self.target.rename(replaced)
        self.path.rename(self.target)
        _sync_folder(self.target.parent)
        self._published = True
        shutil.rmtree(replaced, ignore_errors=True)
        return manifest

    # ---- going on --------------------------------------------------------------------------------

    def _resume(self) -> None:
        """Keep the finished files of an earlier attempt at the same; clear everything else."""
        self._journal.seek(0)
        lines = [_parsed(line) for line in self._journal]
        key = json.loads(json.dumps(self._resume_key))
        if lines and lines[0] == {"key": key} and key is not None:
            for record in filter(None, lines[1:]):
                name = record.pop("file")
                if _holds(self.path / name, record):
                    self._finished[name] = record
            self.messages.append(f"going on: {self.path} has {len(self._finished)} finished files")
        elif lines and key is not None:
            self.messages.append(
                f"starting over: {self.path} was begun from another source or with other options"
            )
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _JOURNAL and path.name not in self._finished:
                path.unlink()
        self._journal.seek(0)
        self._journal.truncate()
        self._write_journal({"key": key})
        for name, record in self._finished.items():
            self._write_journal({"file": name, **record})

    def _write_journal(self, record: dict[str, Any]) -> None:
        self._journal.write(json.dumps(record) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    # ---- no space --------------------------------------------------------------------------------

    @contextmanager
    def _no_space_is_input(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise self._out_of_space() from error
            raise InputError(f"{self.target}: cannot be written: {error}") from error

    def _out_of_space(self) -> NoSpaceError:
        text = f"{self.target}: no space left on its disk"
        if self._finished and self._resume_key is not None:
            text += (
                f"; {self.path} keeps the finished files: make room and run the same command again"
            )
        return NoSpaceError(text)


class NoSpaceError(InputError):
    """The disk is full: nothing is wrong with the input, and the same command may go on later."""


def no_space(error: BaseException) -> OSError | None:
    """The OSError of a full disk that `error` is or comes from."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _NO_SPACE:
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a target that must not be written, before anything is read.

    Raises:
        InputError: it exists and may not be overwritten, or it is no model folder.
    """
    if not target.name:
        raise InputError(f"{target}: not the name of a new folder")
    if not (target.exists() or target.is_symlink()):
        return
    if not target.is_dir() or target.is_symlink():
        raise InputError(f"{target}: exists and is not a folder")
    if not overwrite:
        raise InputError(f"{target}: exists; give another name, or --overwrite to replace it")
    if any(target.iterdir()) and not any((target / name).is_file() for name in _MODEL_FILES):
        raise InputError(
            f"{target}: exists and holds no model; --overwrite replaces model folders only"
        )


def checksum(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _holds(path: Path, record: Mapping[str, Any]) -> bool:
    if not path.is_file() or path.stat().st_size != record["size"]:
        return False
    return checksum(path)["sha256"] == record["sha256"]


def _parsed(line: str) -> dict[str, Any] | None:
    """A line of the journal; None for one that was cut off."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in _PACKAGES}


def _sync_folder(folder: Path) -> None:
    """Make renames last through a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
