"""vLLM as the rollout engine, in the trainer's own processes.

engine.py puts it behind `RolloutEngine`, transfer.py is the way that weights take into it,
environment.py says how it must be started. vLLM is imported here and nowhere else.
"""

from gdpo_megatron.rollout.vllm_engine.engine import VllmEngine

__all__ = ["VllmEngine"]
