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

from gdpo_megatron.conversion.architecture import read_json
from gdpo_megatron.errors import InputError

MANIFEST = "manifest.json"
FORMAT = "gdpo-megatron checkpoint 1"

_JOURNAL = ".journal"
_LOCK = ".lock"
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
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / _LOCK).open("w")
        except OSError as error:
            self._discard_if_useless()
            raise self._cannot_write(error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise InputError(f"{self.path}: another process is writing it") from error
        try:
            self._resume()
        except OSError as error:
            self._discard_if_useless()
            self._lock.close()
            raise self._cannot_write(error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # What was refused would be refused again; what was interrupted can go on.
        if isinstance(error, InputError) and not isinstance(error, NoSpaceError):
            self._finished = {}
        if not self._published:
            self._discard_if_useless()
        self._journal.close()
        self._lock.close()
        if error is not None and (cause := no_space(error)) is not None:
            raise self._out_of_space() from cause

    def _discard_if_useless(self) -> None:
        if not self._finished or self._resume_key is None:
            shutil.rmtree(self.path, ignore_errors=True)

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
        record = {**stream.record(), **extra}
        self._write_journal({"file": name, **record})
        self._finished[name] = record

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
        for name in (_JOURNAL, _LOCK):
            (self.path / name).unlink()
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
        path = self.path / _JOURNAL
        lines = [_parsed(line) for line in path.open()] if path.is_file() else []
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
        for found in self.path.iterdir():
            if found.is_dir():
                shutil.rmtree(found)
            elif found.name not in (_JOURNAL, _LOCK, *self._finished):
                found.unlink()
        # The old journal stands until the new one does: the disk may still be full.
        records = [{"file": name, **record} for name, record in self._finished.items()]
        new = path.with_name(f"{_JOURNAL}.new")
        new.write_text("".join(json.dumps(record) + "\n" for record in ({"key": key}, *records)))
        new.replace(path)
        self._journal = path.open("a")

    def _write_journal(self, record: dict[str, Any]) -> None:
        self._journal.write(json.dumps(record) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    # ---- no space --------------------------------------------------------------------------------

    def _cannot_write(self, error: OSError) -> InputError:
        if error.errno in _NO_SPACE:
            return self._out_of_space()
        return InputError(f"{self.target}: cannot be written: {error}")

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


def manifest_problems(folder: Path) -> list[str] | None:
    """What a folder's files have become since its manifest was written; None without one.

    Files that the manifest does not name are told as well: a loader may pick them up.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return [f"{MANIFEST} is not of the kind '{FORMAT}'"]
    problems: list[str] = []
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != expected["size"]:
            problems.append(f"{name} has {file.stat().st_size:,} bytes, not {expected['size']:,}")
        elif checksum(file)["sha256"] != expected["sha256"]:
            problems.append(f"{name} has another content than when it was written")
    held = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    known = {*manifest["files"], MANIFEST}
    return problems + [f"{name} is not in {MANIFEST}" for name in sorted(held) if name not in known]


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
