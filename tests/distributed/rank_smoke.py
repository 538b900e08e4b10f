"""What the test of the harness runs on ranks."""

from __future__ import annotations

import os
import time

import torch.distributed as dist

calls = 0


def fail_on_one(rank: int) -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} is out of luck")
    dist.barrier()


def leave_traces() -> tuple[int, int, str | None]:
    """(rank, calls of this in the process, what an earlier call left in the environment)."""
    global calls
    calls += 1
    left, os.environ["GDPO_TRACE"] = os.environ.get("GDPO_TRACE"), "left"
    dist.init_process_group("gloo")
    return dist.get_rank(), calls, left


def hang_on_one(rank: int) -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == rank:
        time.sleep(3600)
