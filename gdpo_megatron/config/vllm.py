"""The `rollout.vllm` section: what vLLM is told beside what every engine is told."""

from __future__ import annotations

from gdpo_megatron.config.section import PositiveFloat, section


@section
class VllmConfig:
    """Settings of rollout.engine vllm."""

    kv_cache_gib: PositiveFloat = 1.0
    """Memory of each rank's KV cache in GiB; what does not fit in it waits, or is computed
    again."""

    enforce_eager: bool = True
    """Run the model as it is; false compiles it at every start, which took most of a minute for a
    small model on a CPU."""
