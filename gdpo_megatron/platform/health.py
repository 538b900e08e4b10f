"""What of a platform the check of a job's nodes asks: devices, versions, speed of the network."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import psutil
import torch
import torch.distributed as dist
from torch.cuda import nccl
from torch.distributed import ProcessGroup

from gdpo_megatron.platform.base import Platform


@dataclass(frozen=True, slots=True)
class Probe:
    """How fast all-reduces are measured on a platform.

    Args:
        num_bytes: of one.
        repeats: after one that is not counted.
        min_gb_per_s: bus bandwidth that each node and each pair of nodes must reach, unless
            launch.min_bandwidth_gb_per_s says otherwise.
    """

    num_bytes: int
    repeats: int
    min_gb_per_s: float


PROBES: Final[Mapping[str, Probe]] = {
    # CPUs are for trying out: reported only.
    "cpu": Probe(num_bytes=4 << 20, repeats=3, min_gb_per_s=0.0),
    # 10 Gbit/s Ethernet carries 1.25 GB/s, PCIe 3.0 x16 16 GB/s: below 1 a network card or the path
    # between GPUs is not in use. Taken from what the links carry by their names, not measured.
    "cuda": Probe(num_bytes=128 << 20, repeats=5, min_gb_per_s=1.0),
}
"""By the platform's name."""

NETWORK_HINT: Final = (
    "see which interface it takes (NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME, NCCL_IB_HCA, "
    "GLOO_SOCKET_IFNAME) and the state of the link"
)

LOST_PEER: Final = re.compile(
    "connection (closed|reset|refused|was aborted|timeout)|closed by peer|broken pipe|"
    "remote (error|process)|timed? ?out waiting|socket timeout|watchdog caught collective|"
    "timed out (after|in)|DistNetworkError|ncclRemoteError|ncclSystemError|no route to host",
    re.IGNORECASE,
)
"""What torch and its backends say when the other side of a collective is gone."""


@dataclass(frozen=True, slots=True)
class Device:
    """What a rank computes on.

    Args:
        name: of the model.
        total: bytes of its memory; of a CPU, the rank's part of the machine's.
        free: of them, before anything of the job is there.
    """

    name: str
    total: int
    free: int


def num_devices() -> int | None:
    """Devices of this machine that ranks can have; None where ranks share it."""
    return torch.cuda.device_count() if torch.cuda.is_available() else None


def device_of_rank(platform: Platform) -> Device:
    """This rank's; after `Platform.setup`."""
    if platform.name == "cuda":
        free, total = torch.cuda.mem_get_info()
        return Device(torch.cuda.get_device_name(), total, free)
    memory, ranks = psutil.virtual_memory(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Device(platform.name, memory.total // ranks, memory.available // ranks)


def versions() -> dict[str, str]:
    """Of what only some platforms have."""
    if not torch.cuda.is_available():
        return {}
    return {"NCCL": ".".join(map(str, nccl.version()[:3])), "CUDA": torch.version.cuda or "none"}


def bus_bandwidth(platform: Platform, group: ProcessGroup | None, probe: Probe) -> float:
    """Speed of an all-reduce over a group; collective over it.

    Each link of a ring of n ranks carries 2 (n - 1) / n of the data, whatever n is.

    Args:
        platform: of the ranks.
        group: None is all ranks.
        probe: how to measure.

    Returns:
        10^9 bytes a second.
    """
    data = torch.zeros(probe.num_bytes // 4, device=platform.device)
    dist.all_reduce(data, group=group)
    platform.synchronize()
    began = time.perf_counter()
    for _ in range(probe.repeats):
        dist.all_reduce(data, group=group)
    platform.synchronize()
    seconds = (time.perf_counter() - began) / probe.repeats
    ranks = dist.get_world_size(group)
    return probe.num_bytes / seconds * 2 * (ranks - 1) / ranks / 1e9
