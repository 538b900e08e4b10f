"""Time of a step by a small roofline: arithmetic, memory, messages, each at a share of its peak.

A phase is the sum of its parts; only what the config says to overlap is taken as hidden. Waiting
for the longest completion, the pipeline's bubble and padding to whole micro-batches are counted;
rewards, checkpoints and stragglers are not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gdpo_megatron.algorithms import needs_old_pass, needs_reference
from gdpo_megatron.config.schema import RLConfig
from gdpo_megatron.planning.job import Job, Shape, layers_of_rank
from gdpo_megatron.planning.machine import Assumptions, Gpu
from gdpo_megatron.planning.memory import engine_rows, engine_weight_bytes, kv_bytes_per_token
from gdpo_megatron.planning.state import held_by, model_parameters


@dataclass(frozen=True, slots=True)
class TimePlan:
    """A step.

    Args:
        phases: phase -> seconds.
        bubble: share of the pipeline's time that a stage waits, in an update.
        training_flops: of all updates of a step, all GPUs together, without recomputation.
        step_tokens: prompts and completions of a step.
        utilisation: training_flops against the peak of all GPUs in the update's time.
    """

    phases: dict[str, float]
    bubble: float
    training_flops: float
    step_tokens: float
    utilisation: float

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(self.phases.values())


def bubble_share(job: Job, num_microbatches: int) -> float:
    """Of a pipeline's time: (p - 1) / (v m + p - 1) (Narayanan et al. 2021, arXiv 2104.04473)."""
    waiting = job.pp - 1
    return waiting / (job.vp * num_microbatches + waiting)


def active_parameters(job: Job) -> int:
    """Parameters that one token is multiplied with: its experts only, no embedding."""
    arch = job.arch
    count = model_parameters(job)
    if not arch.tie_word_embeddings:
        count -= arch.vocab_size * arch.hidden_size
    if arch.moe is not None:
        expert = 3 * arch.hidden_size * arch.moe.intermediate_size
        count -= arch.num_layers * (arch.moe.num_experts - arch.moe.top_k) * expert
    return count


def forward_flops(job: Job, tokens: float, row_tokens: float) -> float:
    """Of a forward pass over rows of so many tokens: 2 a parameter, and causal attention."""
    arch = job.arch
    attention = 2 * arch.num_layers * arch.num_attention_heads * arch.head_dim * row_tokens
    return tokens * (2 * active_parameters(job) + attention)


def head_layers(job: Job) -> float:
    """Layers that make a token as much work as the output projection does, attention apart."""
    head = job.arch.vocab_size * job.arch.hidden_size
    return head * job.arch.num_layers / (active_parameters(job) - head)


def slowest_stage_share(job: Job) -> float:
    """Of a pass, what the pipeline rank with the most work has, which the others wait for."""
    head = head_layers(job)
    stages = [sum(layers_of_rank(job, pp_rank)) for pp_rank in range(job.pp)]
    return max(*stages[:-1], stages[-1] + head, 0.0) / (job.arch.num_layers + head)


def recompute_share(job: Job) -> float:
    """Forward passes that recomputation adds to an update, of one."""
    memory, arch = job.config.memory, job.arch
    if memory.recompute_granularity == "full":
        if memory.recompute_method == "block":
            layers = (memory.recompute_num_layers or 0) * job.pp * job.vp
            return min(1.0, layers / arch.num_layers)
        return 1.0
    modules = memory.recompute_modules or ()
    if not {"mlp", "moe"} & set(modules):
        return 0.0
    columns = arch.moe.intermediate_size * arch.moe.top_k if arch.moe else arch.intermediate_size
    return 3 * arch.hidden_size * columns * arch.num_layers / active_parameters(job)


class _Rates:
    """What the machine does in a second, as assumed."""

    def __init__(self, job: Job, gpu: Gpu, gpus_per_node: int, given: Assumptions):
        self.gpu, self.per_node, self.given, self.job = gpu, gpus_per_node, given, job
        fp8 = job.config.precision.fp8 is not None and gpu.fp8_flops
        peak = gpu.fp8_flops if fp8 and gpu.fp8_flops else gpu.bf16_flops
        self.training = peak * given.training_efficiency
        self.decode = gpu.bf16_flops * given.decode_flops_efficiency
        self.memory = gpu.memory_rate * given.memory_efficiency

    def sent(self, num_bytes: float, ranks: int, span: int) -> float:
        """Seconds of a ring over `ranks`, of which the furthest are `span` ranks apart.

        Args:
            num_bytes: of the whole tensor that is gathered or scattered.
            ranks: of the group.
            span: world ranks from the first to the last, plus one.
        """
        if ranks == 1:
            return 0.0
        rate = self.gpu.link_rate if span <= self.per_node else self.gpu.network_rate
        return num_bytes * (ranks - 1) / ranks / (rate * self.given.link_efficiency)


def time_plan(job: Job, gpu: Gpu, gpus_per_node: int, given: Assumptions) -> TimePlan:
    """Of one step."""
    rates, config = _Rates(job, gpu, gpus_per_node, given), job.config
    longest = config.model.max_sequence_length
    row_tokens: float = longest
    rows = job.rows_per_update * job.updates_per_step
    if isinstance(config, RLConfig):
        rows = config.rollout.num_prompts_per_step * config.rollout.group_size
        completion, prompt = _lengths(config, given)
        row_tokens = prompt + completion
    tokens = rows * row_tokens
    shape = job.shape(max(2, math.ceil(row_tokens)))
    bubble = bubble_share(job, shape.num_microbatches)
    passes = 3.0 + recompute_share(job)
    update = _pass_seconds(job, rates, shape, passes) / (1 - bubble)
    update += _reduction_seconds(job, rates)
    phases: dict[str, float] = {}
    if isinstance(config, RLConfig):
        phases["weight_sync"] = _sync_seconds(job, rates)
        phases["rollout"] = _rollout_seconds(job, config, rates)
        one = job.updates_per_step * _pass_seconds(job, rates, shape, 1.0) / (1 - bubble)
        if needs_old_pass(config.loss):
            phases["logprobs"] = one
        if needs_reference(config.loss):
            phases["reference"] = one
    phases["update"] = update * job.updates_per_step
    flops = 3 * forward_flops(job, tokens, row_tokens)
    peak = gpu.fp8_flops if config.precision.fp8 and gpu.fp8_flops else gpu.bf16_flops
    utilisation = flops / (phases["update"] * job.world_size * peak)
    return TimePlan(phases, bubble, flops, tokens, utilisation)


def _lengths(config: RLConfig, given: Assumptions) -> tuple[float, float]:
    """(completion, prompt) in the mean."""
    longest = config.rollout.max_completion_tokens
    room = config.model.max_sequence_length - longest
    return longest * given.completion_share, room * given.prompt_share


def _pass_seconds(job: Job, rates: _Rates, shape: Shape, passes: float) -> float:
    """Of all micro-batches of one data-parallel rank on the slowest stage, without the bubble.

    Args:
        job: the job.
        rates: of the machine.
        shape: of a micro-batch.
        passes: 1 forward; 3 and what is recomputed with the backward pass.
    """
    flops = forward_flops(job, shape.tokens, shape.row_tokens) / (job.tp * job.cp)
    seconds = passes * flops * slowest_stage_share(job) / rates.training
    hidden = shape.tokens // job.cp * job.arch.hidden_size * job.dtype_bytes
    layers = max(sum(layers_of_rank(job, pp_rank)) for pp_rank in range(job.pp))
    backward = passes > 1
    # Forward: a gather (or half an all-reduce) and a scatter around attention and around the MLP;
    # backward the same, and the gather of the inputs for the weights' gradients.
    around = 4 + (6 if backward else 0)
    seconds += layers * around * rates.sent(hidden, job.tp, job.tp)
    if job.cp > 1:
        keys = 2 * job.arch.num_key_value_heads * job.arch.head_dim / job.tp
        gathered = shape.tokens * keys * job.dtype_bytes
        times = 2 if backward else 1
        seconds += layers * times * rates.sent(gathered, job.cp, job.tp * job.cp)
    if job.arch.moe is not None and job.ep > 1:
        share = job.tp if job.config.parallel.sequence_parallel else 1
        routed = hidden / share * job.arch.moe.top_k
        times = 4 if backward else 2
        seconds += layers * times * rates.sent(routed, job.ep, job.ep * job.etp)
    if job.pp > 1:
        share = job.tp if job.config.parallel.sequence_parallel else 1
        span = 2 * job.world_size // job.pp
        crossing = hidden / share * job.vp * (2 if backward else 1)
        seconds += 2 * rates.sent(crossing, 2, span)
    return seconds * shape.num_microbatches


def _reduction_seconds(job: Job, rates: _Rates) -> float:
    """Gradients over data-parallel ranks, the optimizer, updated parameters back."""
    held = held_by(job, 0)
    span = job.world_size // job.pp
    parallel = job.config.parallel
    seconds = (2 * held.optimizer + held.gradients / max(1, job.dp)) / rates.memory
    if not parallel.overlap_grad_reduce:
        seconds += rates.sent(held.gradients, job.dp * job.cp, span)
    if not parallel.overlap_param_gather:
        trained = held.gradients // 4 * job.dtype_bytes
        seconds += rates.sent(trained, job.dp * job.cp, span)
    return seconds


def _sync_seconds(job: Job, rates: _Rates) -> float:
    """Whole tensors on every rank: shards over stages and experts' ranks, then over TP."""
    whole = model_parameters(job) * job.dtype_bytes
    seconds = rates.sent(whole / job.tp, job.pp, job.world_size)
    if job.arch.moe is not None:
        seconds += rates.sent(whole / job.etp, job.ep, job.ep * job.etp)
    seconds += rates.sent(whole, job.tp, job.tp)
    return seconds + 3 * whole / rates.memory  # written, split, copied into the engine


def _rollout_seconds(job: Job, config: RLConfig, rates: _Rates) -> float:
    """Prefill, then one token of all sequences after the other.

    A token takes the longer of reading weights and keys and of multiplying, and two all-reduces a
    layer among the engine's ranks.
    """
    given, arch, tp = rates.given, job.arch, config.rollout.tensor_parallel_size
    completion, prompt = _lengths(config, given)
    rows = engine_rows(job, config)
    together = min(rows, config.rollout.max_concurrent_sequences)
    of_token = kv_bytes_per_token(job, tp)
    if config.rollout.engine == "vllm":
        from gdpo_megatron.planning.memory import kv_cache_bytes

        fits = kv_cache_bytes(job, config) / (of_token * (prompt + completion))
        together = max(1, min(together, int(fits)))
    prefill = forward_flops(job, rows * prompt, prompt) / tp / rates.decode
    read = _read_weights(job, config, together) + together * of_token * (prompt + completion / 2)
    flops = forward_flops(job, together, prompt + completion / 2) / tp
    step = max(read / rates.memory, flops / rates.decode) + given.decode_overhead_seconds
    if tp > 1:
        hidden = together * arch.hidden_size * job.dtype_bytes
        step += 2 * arch.num_layers * (given.collective_seconds + 2 * rates.sent(hidden, tp, tp))
    steps = rows * completion / together
    if given.longest_waits:
        steps = max(steps, config.rollout.max_completion_tokens)
    return prefill + steps * step


def _read_weights(job: Job, config: RLConfig, rows: int) -> float:
    """Bytes of weights that a token of `rows` sequences needs: of experts those that are asked."""
    whole, moe = engine_weight_bytes(job, config), job.arch.moe
    if moe is None:
        return whole
    columns = 3 * job.arch.hidden_size * moe.intermediate_size
    experts = job.arch.num_layers * moe.num_experts * columns * job.dtype_bytes
    experts /= config.rollout.tensor_parallel_size
    asked = 1 - (1 - moe.top_k / moe.num_experts) ** rows
    return whole - experts * (1 - asked)
