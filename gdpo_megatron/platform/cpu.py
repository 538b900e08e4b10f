"""CPUs over gloo: the laptop platform, and the one that CI trains on.

Megatron-Core is the real one; megatron_cpu.py redirects what it asks of CUDA.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from gdpo_megatron.platform.memory import MemoryProbe, host_probe


class CpuPlatform:
    """One process per rank, one thread each unless OMP_NUM_THREADS says otherwise."""

    name = "cpu"
    backend = "gloo"
    # Each of these selects a CUDA or apex kernel, or allocates on a GPU.
    model_overrides: Mapping[str, Any] = {
        "use_cpu_initialization": True,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "fused_residual_rmsnorm": False,
        # gloo's send is asynchronous: freeing a stage's output would free what is being sent.
        "deallocate_pipeline_outputs": False,
    }

    # More threads than one a rank only fight over the cores.
    environment: Mapping[str, str] = {"OMP_NUM_THREADS": "1"}

    gathers_uneven_parts = False

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def setup(self, local_rank: int) -> None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

    def prepare_megatron(self) -> None:
        from gdpo_megatron.platform import megatron_cpu

        megatron_cpu.install()

    def has_transformer_engine(self) -> bool:
        return False

    def missing_for_fp8(self) -> str | None:
        return None  # computed in float32, from operands of 8 bits

    @property
    def device_name(self) -> str:
        return self.name

    def synchronize(self) -> None:
        """CPU operations are done when they return."""

    def memory_probe(self) -> MemoryProbe:
        return host_probe()
