"""Files that are either there in full or not at all, whenever the run is killed."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 `text` to `path`, replacing what was there; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that the rename stays within one file system.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
