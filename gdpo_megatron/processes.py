"""What a process asks the kernel about itself and its children (Linux)."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PAGE = os.sysconf("SC_PAGE_SIZE")


def die_with_parent(number: signal.Signals) -> None:
    """Let the kernel send this process a signal when its parent ends, however it ends.

    The parent is the thread that started this process, not its whole process.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def resident_bytes(process: int | str) -> int:
    """Resident memory of a process ("self" for this one); 0 when it is gone."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0
