"""GPUs and networks as their data sheets have them, and what of it a run is assumed to reach.

Peaks are of public data sheets (NVIDIA A100 80GB SXM, H100 SXM, H200 SXM, DGX A100/H100/H200 for
the network), dense, without sparsity; links are per direction. What a run reaches of them are
assumptions of this project, in one place and shown with every plan: no GPU has been measured. The
"cpu" entry stands for one core of a laptop and is an order of magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gdpo_megatron.platform.gpus import GPUS as SHEETS

_GB, _GIB = 1e9, 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU.

    Args:
        memory_bytes: that it has.
        bf16_flops: dense matrix products a second.
        fp8_flops: the same in FP8; None where it has none.
        memory_rate: bytes a second.
        link_rate: to the other GPUs of its node, bytes a second and direction.
        network_rate: to other nodes, bytes a second and direction, its share of the node's.
    """

    memory_bytes: float
    bf16_flops: float
    fp8_flops: float | None
    memory_rate: float
    link_rate: float
    network_rate: float


GPUS: Final[dict[str, Gpu]] = {
    "a100-80": Gpu(
        memory_bytes=SHEETS["a100-80"].memory_gb * _GB,
        bf16_flops=312e12,
        fp8_flops=None,
        memory_rate=2039 * _GB,
        link_rate=300 * _GB,
        network_rate=25 * _GB,
    ),
    "h100-80": Gpu(
        memory_bytes=SHEETS["h100-80"].memory_gb * _GB,
        bf16_flops=989e12,
        fp8_flops=1979e12,
        memory_rate=3350 * _GB,
        link_rate=450 * _GB,
        network_rate=50 * _GB,
    ),
    "h200-141": Gpu(
        memory_bytes=SHEETS["h200-141"].memory_gb * _GB,
        bf16_flops=989e12,
        fp8_flops=1979e12,
        memory_rate=4800 * _GB,
        link_rate=450 * _GB,
        network_rate=50 * _GB,
    ),
    "cpu": Gpu(
        memory_bytes=4 * _GIB,
        bf16_flops=20e9,
        fp8_flops=None,
        memory_rate=10 * _GB,
        link_rate=1 * _GB,
        network_rate=0.1 * _GB,
    ),
}

_DEVICES: Final = (
    ("NVIDIA A100-SXM4-80GB", "a100-80"),
    ("NVIDIA H100 80GB HBM3", "h100-80"),
    ("NVIDIA H200", "h200-141"),
    ("cpu", "cpu"),
)
"""What devices call themselves, and the entry that is theirs."""


def gpu_of(device_name: str) -> str | None:
    """Name in GPUS of a device; None where there is none (see Platform.device_name)."""
    return next((name for device, name in _DEVICES if device == device_name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What the time of a step is computed with; none of it is measured."""

    training_efficiency: float = 0.45
    """Of the peak, in the matrix products of training."""
    decode_flops_efficiency: float = 0.5
    """Of the peak, in the matrix products of generation."""
    memory_efficiency: float = 0.7
    """Of the memory's rate, in generation and in the optimizer."""
    link_efficiency: float = 0.7
    """Of the links' and the network's rate, in collectives."""
    collective_seconds: float = 20e-6
    """Of a collective in generation, however small."""
    decode_overhead_seconds: float = 2e-3
    """Of a token of all sequences, beside what the GPU computes: scheduling and sampling."""
    completion_share: float = 0.5
    """Mean completion, of max_completion_tokens."""
    prompt_share: float = 0.5
    """Mean prompt, of what is left of max_sequence_length beside the longest completion."""
    longest_waits: bool = True
    """Generation ends with the longest completion, of max_completion_tokens."""
    reserved_bytes: float = 4 * 2**30
    """Of a GPU: context, communicators, kernels' workspaces."""
    usable_share: float = 0.95
    """Of what is left: fragments."""


def usable_bytes(gpu: Gpu, assumptions: Assumptions) -> float:
    """Memory that a plan may fill."""
    if gpu is GPUS["cpu"]:
        return gpu.memory_bytes
    return (gpu.memory_bytes - assumptions.reserved_bytes) * assumptions.usable_share
