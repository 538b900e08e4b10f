"""NVIDIA GPUs over NCCL. Megatron is at home here: nothing of it is touched."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch

from gdpo_megatron.platform.megatron_versions import megatron_version
from gdpo_megatron.platform.memory import MemoryProbe

FIRST_WITH_FP8 = (8, 9)  # Ada; Hopper is (9, 0)


class CudaPlatform:
    """One GPU per rank."""

    name = "cuda"
    backend = "nccl"
    model_overrides: Mapping[str, Any] = {}
    # One queue per device: Megatron overlaps communication by the order of its launches.
    environment: Mapping[str, str] = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}

    gathers_uneven_parts = True

    def __init__(self) -> None:
        self.device = torch.device("cuda")

    def setup(self, local_rank: int) -> None:
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise RuntimeError(
                f"local rank {local_rank} has no GPU: this node shows {count}; "
                f"start at most {count} processes here"
            )
        torch.cuda.set_device(local_rank)
        self.device = torch.device("cuda", local_rank)

    def prepare_megatron(self) -> None:
        """Megatron runs here as it is, in a version that is supported."""
        megatron_version()

    def has_transformer_engine(self) -> bool:
        return importlib.util.find_spec("transformer_engine") is not None

    def missing_for_fp8(self) -> str | None:
        capability = torch.cuda.get_device_capability()
        if capability >= FIRST_WITH_FP8:
            return None
        has, needed = (".".join(map(str, it)) for it in (capability, FIRST_WITH_FP8))
        return (
            f"a GPU of compute capability {needed} or higher (Ada, Hopper); "
            f"{torch.cuda.get_device_name()} has {has}"
        )

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def memory_probe(self) -> MemoryProbe:
        return MemoryProbe(
            "device_peak", torch.cuda.max_memory_allocated, torch.cuda.reset_peak_memory_stats
        )
