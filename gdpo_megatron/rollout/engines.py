"""The built-in engines, by the names that configs use. What an engine needs is imported with it."""

from __future__ import annotations

from gdpo_megatron.rollout.base import EngineSetup, RolloutEngine, engines


@engines.register("native")
def native_engine(setup: EngineSetup) -> RolloutEngine:
    """Lean KV-cache decoding, on any platform."""
    from gdpo_megatron.rollout.native import NativeEngine

    return NativeEngine(
        setup.arch,
        setup.tokenizer,
        mesh=setup.mesh,
        platform=setup.platform,
        dtype=setup.dtype,
        max_sequence_length=setup.max_sequence_length,
        max_concurrent_sequences=setup.max_concurrent_sequences,
    )


@engines.register("vllm")
def vllm_engine(setup: EngineSetup) -> RolloutEngine:
    """VLLM in the trainer's processes."""
    from gdpo_megatron.rollout.vllm_engine import VllmEngine

    return VllmEngine(setup)
