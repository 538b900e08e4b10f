"""Ending a run on SIGTERM or SIGINT without losing it.

The signal is only noted. At the end of each step the ranks agree on whether any of them has seen
one; then all save and leave together.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # noted before anything is imported that takes long
    from gdpo_megatron.platform import Platform

INTERRUPTED = 130
"""Exit code of a job that was told to end, and has saved."""

_noted = threading.Event()  # signals are the process's, so this is too


def note_signals() -> None:
    """Note SIGINT and SIGTERM from now on, instead of ending."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: _noted.set())


class Interrupt:
    """Whether a run has been told to end, since `note_signals`.

    Args:
        platform: where the agreement runs.
    """

    def __init__(self, platform: Platform):
        self._platform = platform

    def agreed(self) -> bool:
        """Whether any rank has been told to end; collective.

        The launchers of all nodes get to know it, also those that were not told themselves.
        """
        import torch
        import torch.distributed as dist

        flag = torch.tensor(float(_noted.is_set()), device=self._platform.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        agreed = bool(flag.item())
        beside = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if agreed and beside:
            Path(beside).with_suffix(".interrupted").touch()
        return agreed
