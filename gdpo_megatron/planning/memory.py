"""Memory of a GPU and of its host in each phase of a colocated step, part by part."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gdpo_megatron.algorithms import needs_old_pass, needs_reference
from gdpo_megatron.config.schema import RLConfig
from gdpo_megatron.config.vllm import VllmConfig
from gdpo_megatron.planning.activations import forward_bytes, update_bytes
from gdpo_megatron.planning.job import Job, layers_of_rank
from gdpo_megatron.planning.state import Held, held_by, model_parameters

PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "reference",
    "engine weights",
    "KV cache",
    "sync buckets",
    "activations",
    "log-probs",
)
"""What a GPU's memory holds, in the order of the chart."""

_VLLM_BATCHED_TOKENS = 16384
"""Tokens that vLLM 0.32 computes at a time on a GPU of 70 GiB or more, unless it is told otherwise;
8192 on an A100."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of one rank.

    Args:
        pp_rank: of the pipeline stage that it is of.
        held: between two passes.
        phases: phase -> part -> bytes on the GPU.
        host_bytes: of the rank's process in host memory, beside the interpreter.
    """

    pp_rank: int
    held: Held
    phases: dict[str, dict[str, int]]
    host_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Of the phase that needs the most."""
        return max(sum(parts.values()) for parts in self.phases.values())

    @property
    def peak_phase(self) -> str:
        """The phase that needs the most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))


def memory_plan(job: Job) -> MemoryPlan:
    """Of the stage whose ranks need the most."""
    plans = [_of_stage(job, pp_rank) for pp_rank in _different_stages(job)]
    return max(plans, key=lambda plan: plan.peak_bytes)


def _different_stages(job: Job) -> list[int]:
    """Pipeline ranks of which one needs the most: of equal ones between the ends, the first.

    The later a stage, the fewer micro-batches are under way in it.
    """
    of_layers: dict[tuple[int, ...], int] = {}
    for pp_rank in range(1, job.pp - 1):
        of_layers.setdefault(tuple(layers_of_rank(job, pp_rank)), pp_rank)
    return sorted({0, *of_layers.values(), job.pp - 1})


def _of_stage(job: Job, pp_rank: int) -> MemoryPlan:
    held, shape, config = held_by(job, pp_rank), job.shape(), job.config
    state = {
        "weights": held.parameters,
        "gradients": held.gradients,
        "optimizer": held.optimizer,
    }
    update = update_bytes(job, shape, pp_rank)
    of_update = state | {"activations": update.layers + update.working, "log-probs": update.head}
    if not isinstance(config, RLConfig):
        return MemoryPlan(pp_rank, held, {"update": of_update}, 0)
    host = 0
    if needs_reference(config.loss) and config.model.lora is None:
        if config.memory.reference == "separate":
            state = state | {"reference": held.num_parameters * job.dtype_bytes}
        else:
            host = held.own_parameters
    idle = dict(state)
    if config.memory.free_grad_buffers_during_rollout:
        idle["gradients"] = 0
    engine = engine_weight_bytes(job, config)
    phases = {
        # The engine is awake with its weights while the trainer's are still all there.
        "weight_sync": idle | {"engine weights": engine, "sync buckets": sync_bytes(job, config)},
        "rollout": idle
        | {
            "engine weights": engine,
            "KV cache": kv_cache_bytes(job, config),
            "activations": engine_working_bytes(job, config),
        },
    }
    forward = {"activations": forward_bytes(job, shape, pp_rank)}
    if needs_old_pass(config.loss):
        phases["logprobs"] = idle | forward
    if needs_reference(config.loss):
        phases["reference"] = idle | forward
    phases["update"] = state | of_update
    return MemoryPlan(pp_rank, held, phases, host)


def engine_weight_bytes(job: Job, config: RLConfig) -> int:
    """Of one rank of an engine: a copy of its own."""
    return model_parameters(job) * job.dtype_bytes // config.rollout.tensor_parallel_size


def engine_rows(job: Job, config: RLConfig) -> int:
    """Completions that an engine has to make in a step."""
    engines = job.world_size // config.rollout.tensor_parallel_size
    rollout = config.rollout
    return math.ceil(rollout.num_prompts_per_step / engines) * rollout.group_size


def kv_bytes_per_token(job: Job, engine_tp: int) -> int:
    """Keys and values of one token, on one rank of an engine."""
    heads = max(1, job.arch.num_key_value_heads // engine_tp)
    return 2 * job.arch.num_layers * heads * job.arch.head_dim * job.dtype_bytes


def kv_cache_bytes(job: Job, config: RLConfig) -> int:
    """Of one rank: vLLM's as it is set, the native engine's as its sequences are long."""
    if config.rollout.engine == "vllm":
        return int((config.rollout.vllm or VllmConfig()).kv_cache_gib * 2**30)
    rows = min(config.rollout.max_concurrent_sequences, engine_rows(job, config))
    of_token = kv_bytes_per_token(job, config.rollout.tensor_parallel_size)
    return rows * config.model.max_sequence_length * of_token


def engine_working_bytes(job: Job, config: RLConfig) -> int:
    """Of one rank of vLLM while it generates; the native engine's is left out.

    The hidden states of a batch, one layer's MLP or experts, and the log-probs of one token of all
    sequences over the whole vocabulary.
    """
    if config.rollout.engine != "vllm":
        return 0
    arch, tp, e = job.arch, config.rollout.tensor_parallel_size, job.dtype_bytes
    if arch.moe is None:
        inner = 3 * arch.intermediate_size // tp
    else:
        inner = arch.moe.top_k * (3 * arch.moe.intermediate_size // tp + arch.hidden_size)
    layer = _VLLM_BATCHED_TOKENS * (3 * arch.hidden_size + inner) * e
    rows = min(config.rollout.max_concurrent_sequences, engine_rows(job, config))
    return layer + rows * arch.vocab_size * (e + 8)


def _reloaded_layer_bytes(job: Job) -> int:
    """Whole tensors of the largest layer: vLLM holds them until it has all of the layer's."""
    arch, moe = job.arch, job.arch.moe
    if moe is None:
        return 2 * arch.intermediate_size * arch.hidden_size * job.dtype_bytes
    return 3 * moe.num_experts * moe.intermediate_size * arch.hidden_size * job.dtype_bytes


def sync_bytes(job: Job, config: RLConfig) -> int:
    """One bucket of whole tensors, this rank's shards of it, and what vLLM holds back of them."""
    if job.tp == job.pp == job.ep == 1:
        return 0  # tensors are views of the parameters
    held = _reloaded_layer_bytes(job) if config.rollout.engine == "vllm" else 0
    vocabulary = job.arch.vocab_size * job.arch.hidden_size * job.dtype_bytes
    bucket = max(config.weight_sync.bucket_mb * 2**20, vocabulary)
    # Of a tensor that is cut: its shards as they come, and put together.
    return held + bucket + bucket // job.tp + (bucket if job.tp > 1 else 0)
