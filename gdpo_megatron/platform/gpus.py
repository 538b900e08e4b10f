"""GPUs that a job can be checked for on a machine that has none; numbers of their data sheets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from gdpo_megatron.platform.cuda import FIRST_WITH_FP8, CudaPlatform

ENVIRONMENT: Final[Mapping[str, str]] = CudaPlatform.environment
"""Variables that a worker on such a machine gets."""

_FIRST_WITH_BFLOAT16 = (8, 0)  # Ampere


@dataclass(frozen=True, slots=True)
class Gpu:
    """A kind of GPU.

    Args:
        memory_gb: of one, in 10^9 bytes.
        capability: compute capability.
    """

    memory_gb: int
    capability: tuple[int, int]

    def missing_for(self, dtype: str, with_fp8: bool) -> list[str]:
        """What of a config's precision it cannot do.

        Args:
            dtype: precision.params_dtype.
            with_fp8: whether there is a section precision.fp8.
        """
        needs = {
            "precision.params_dtype bfloat16": _FIRST_WITH_BFLOAT16
            if dtype == "bfloat16"
            else None,
            "precision.fp8": FIRST_WITH_FP8 if with_fp8 else None,
        }
        return [
            f"{what} needs a GPU of compute capability {first[0]}.{first[1]} or higher; this one "
            f"has {self.capability[0]}.{self.capability[1]}"
            for what, first in needs.items()
            if first is not None and self.capability < first
        ]


GPUS: Final[Mapping[str, Gpu]] = {
    "v100-32": Gpu(32, (7, 0)),
    "a100-40": Gpu(40, (8, 0)),
    "a100-80": Gpu(80, (8, 0)),
    "l40s-48": Gpu(48, (8, 9)),
    "h100-80": Gpu(80, (9, 0)),
    "h200-141": Gpu(141, (9, 0)),
    "b200-180": Gpu(180, (10, 0)),
}
"""By the name that the command line takes."""
