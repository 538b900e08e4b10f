"""What the test of the harness runs on ranks."""

from __future__ import annotations

import torch.distributed as dist


def fail_on_one(rank: int) -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} is out of luck")
    dist.barrier()
