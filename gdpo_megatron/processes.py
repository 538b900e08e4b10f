"""What a process asks the kernel about itself and its children (Linux)."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

LAUNCHER = "GDPO_LAUNCHER_PID"
"""Environment variable of a rank: the process that has started it."""

_PR_SET_PDEATHSIG = 1
_PAGE = os.sysconf("SC_PAGE_SIZE")


def die_with_parent(number: signal.Signals, parent: int | None = None) -> None:
    """Let the kernel send this process a signal when its parent ends, however it ends.

    The parent is the thread that started this process, not its whole process.

    Args:
        number: of the signal.
        parent: its process id, where that is known: if it has ended before this call, the signal
            is sent now.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), number)


def resident_bytes(process: int | str) -> int:
    """Resident memory of a process ("self" for this one); 0 when it is gone."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0
