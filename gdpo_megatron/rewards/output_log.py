"""Where what rewards print goes: a file that is made when something is, and bounded."""

from __future__ import annotations

import sys
from pathlib import Path

_MAX_LOG_BYTES = 16 * 2**20


class OutputLog:
    """The file.

    Args:
        path: of it; None drops everything.
    """

    def __init__(self, path: str | None):
        self._path = Path(path) if path is not None else None
        self._num_left = _MAX_LOG_BYTES

    def write(self, data: bytes) -> None:
        """Add what was printed; after 16 MiB, or where the disk is full, nothing more."""
        if self._path is None or self._num_left <= 0:
            return
        self._num_left -= len(data)
        if self._num_left <= 0:
            data = data[: self._num_left] + b"\n(the log is full; what follows is dropped)\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.write(data)
        except OSError as error:  # a full disk: what rewards print is not worth a run
            self._num_left = 0
            print(f"{self._path}: {error.strerror}; no more is written", file=sys.stderr)
