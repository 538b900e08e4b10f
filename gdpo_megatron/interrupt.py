"""Ending a run on SIGTERM or SIGINT without losing it.

The signal is only noted. At the end of each step the ranks agree on whether any of them has seen
one; then all save and leave together.
"""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

from gdpo_megatron.platform import Platform


class Interrupt:
    """Notes SIGINT and SIGTERM from its creation on.

    Args:
        platform: where the agreement runs.
    """

    def __init__(self, platform: Platform):
        self._platform = platform
        self._noted = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True

    def agreed(self) -> bool:
        """Whether any rank has been told to end; collective."""
        flag = torch.tensor(float(self._noted), device=self._platform.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
