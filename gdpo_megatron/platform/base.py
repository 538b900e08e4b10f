"""The machine under a run, behind one object.

A `Platform` says where tensors live, how ranks talk, and what Megatron needs before it can be
imported there. Everything above asks the platform; nothing above names a device or a backend.
`detect_platform` picks the one that this machine has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from gdpo_megatron.platform.memory import MemoryProbe


class Platform(Protocol):
    """What the rest of the package may know of the machine."""

    name: str
    """For messages and logs."""

    backend: str
    """torch.distributed backend."""

    device: torch.device
    """Where this rank's tensors live; valid after `setup`."""

    model_overrides: Mapping[str, Any]
    """TransformerConfig fields that this platform dictates."""

    environment: Mapping[str, str]
    """Variables that a worker wants before it starts; what the user has set wins."""

    gathers_uneven_parts: bool
    """Whether all_gather takes parts of different sizes."""

    def setup(self, local_rank: int) -> None:
        """Choose this rank's device. Call once, before anything else of the platform."""
        ...

    def prepare_megatron(self) -> None:
        """Make `megatron.core` importable here. Call before its first import.

        Raises:
            InputError: it is not installed, or in a version that is not supported.
            RuntimeError: it was imported already and would keep what must be replaced.
        """
        ...

    def has_transformer_engine(self) -> bool:
        """Whether the Transformer Engine layer spec can be used."""
        ...

    def missing_for_fp8(self) -> str | None:
        """What torch's FP8 matrix product needs and this machine lacks; None where it runs."""
        ...

    @property
    def device_name(self) -> str:
        """What this rank's device calls itself; valid after `setup`."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has done what was queued."""
        ...

    def memory_probe(self) -> MemoryProbe:
        """What keeps the peak of the memory that runs out first here."""
        ...


def detect_platform() -> Platform:
    """Return the platform of this machine: GPU where torch sees one, else CPU."""
    if torch.cuda.is_available():
        from gdpo_megatron.platform.cuda import CudaPlatform

        return CudaPlatform()
    from gdpo_megatron.platform.cpu import CpuPlatform

    return CpuPlatform()
