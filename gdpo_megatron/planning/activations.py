"""What an update keeps for its backward pass, by arithmetic: bytes of the tensors that are alive.

The terms are those of the layers that run on a CPU (policy/layer_spec.py), found by looking at
what autograd keeps, operation by operation; docs/planning.md compares them with real runs and with
the dry run. Letters, of one rank and one micro-batch:

    T tokens of this context-parallel rank     h hidden size         e bytes of an activation
    N tokens of this rank between the layers,  q, k columns of queries and of keys, of this rank
      T / TP under sequence parallelism        f columns of the MLP, of this rank
    c tokens whose logits exist at a time      W vocabulary of this rank

Transformer Engine's layers keep other tensors, mostly fewer (its norms are part of the linear
layers that follow them): for them these are upper estimates, which no GPU has been asked about.
"""

from __future__ import annotations

from dataclasses import dataclass

from gdpo_megatron.planning.job import Job, Shape, layers_of_rank

_FEW = 16
"""Bytes of a token for labels, masks, log-probs."""


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes of one update at its peak.

    Args:
        layers: what layers keep, of all micro-batches under way.
        head: log-probs: logits, and what their gradient needs.
        working: gradients of activations, what is computed again, what passes between stages.
    """

    layers: int
    head: int
    working: int

    @property
    def total(self) -> int:
        """At the peak."""
        return self.layers + self.head + self.working


class _Sizes:
    """The letters of this file."""

    def __init__(self, job: Job, shape: Shape):
        arch, parallel = job.arch, job.config.parallel
        self.e = job.dtype_bytes
        self.T = shape.tokens // job.cp
        self.N = self.T // job.tp if parallel.sequence_parallel else self.T
        self.h = arch.hidden_size
        self.heads = arch.num_attention_heads // job.tp
        self.groups = max(1, arch.num_key_value_heads // job.tp)
        self.q, self.k = self.heads * arch.head_dim, self.groups * arch.head_dim
        self.f = arch.intermediate_size // job.tp
        self.W = arch.padded_vocab_size(job.tp) // job.tp
        self.columns = shape.columns // job.cp
        chunk = job.config.memory.logprob_chunk_tokens
        self.c = None if chunk is None else min(chunk, self.T)


def norm_bytes(width: int, dtype_bytes: int) -> int:
    """A norm's of one token: its input and the normalised one in float32, its result."""
    return (12 if dtype_bytes == 4 else 10) * width + 4


def attention_bytes(job: Job, shape: Shape) -> int:
    """Kept of one layer's attention, its norm included."""
    s, d = _Sizes(job, shape), job.arch.head_dim
    qkv = (s.q + 2 * s.k) * s.e  # values are a part of it
    of_token = s.q * s.e + s.k * s.e + qkv + s.q * s.e + 4 * s.heads
    if job.arch.has_qk_norm:
        of_token += 4 * (s.heads + s.groups) + 8 * s.q + (4 if s.e == 4 else 8) * s.k
    of_row = 4 * d * s.e  # cosines and sines, of queries and of keys
    of_layer = 0
    if job.cp > 1:
        # Keys and values of all ranks, in order, and which of them a query sees.
        of_token += 2 * s.k * s.e * job.cp - s.k * s.e
        of_token -= 0 if job.arch.has_qk_norm else qkv
        of_layer = s.columns * s.columns * job.cp * s.e
    return s.N * norm_bytes(s.h, s.e) + s.T * of_token + s.columns * of_row + of_layer


def mlp_bytes(job: Job, shape: Shape, *, inner: bool = True) -> int:
    """Kept of one layer's MLP or experts and their norm; without what is inside, of the norm."""
    s, moe = _Sizes(job, shape), job.arch.moe
    kept = s.N * norm_bytes(s.h, s.e)
    if not inner:
        return kept
    if moe is None:
        return kept + s.T * 5 * s.f * s.e  # both halves, silu, the other half, their product
    # Each token as often as it has experts: its copy, both halves, silu, the other half, their
    # product, the product with its weight; where it came from, and its weight.
    columns = moe.intermediate_size // job.etp
    routed = s.N * job.etp * moe.top_k * (6 * columns + s.h) * s.e
    return kept + routed + s.N * moe.top_k * (12 + s.e) + s.N * 2 * moe.num_experts * s.e


def layer_bytes(job: Job, shape: Shape, *, kept: str) -> int:
    """Of one layer: all ("all"), or its input only ("input")."""
    s = _Sizes(job, shape)
    if kept == "input":
        return s.N * s.h * s.e
    modules = job.config.memory.recompute_modules or ()
    inner = not ({"mlp", "moe"} & set(modules))
    return attention_bytes(job, shape) + mlp_bytes(job, shape, inner=inner)


def stage_bytes(job: Job, shape: Shape, layers: int) -> int:
    """Kept of the layers of a stage."""
    memory = job.config.memory
    number = memory.recompute_num_layers or 0
    whole = layer_bytes(job, shape, kept="all")
    only_input = layer_bytes(job, shape, kept="input")
    if memory.recompute_method == "uniform":
        return layers // max(1, number) * only_input
    if memory.recompute_method == "block":
        recomputed = min(number, layers)
        return recomputed * only_input + (layers - recomputed) * whole
    return layers * whole


def head_bytes(job: Job, shape: Shape) -> int:
    """The final norm, and log-probs at the peak of their backward pass."""
    s = _Sizes(job, shape)
    sequence_parallel = job.config.parallel.sequence_parallel
    # Under sequence parallelism the hidden states are gathered before, and what was is kept.
    gathered = s.T * s.h * s.e + s.N * s.h * s.e if sequence_parallel else 0
    norm = s.N * norm_bytes(s.h, s.e) + gathered
    if s.c is None:
        # Logits, two tensors of float32, and the gradient: in float32 in one of them.
        return norm + s.T * s.W * 12 + s.T * s.h * s.e * (2 if sequence_parallel else 0)
    gradient = s.T * s.h * s.e + s.W * s.h * 4
    of_chunk = 16 * s.c * s.W
    if s.e == 2:  # a chunk's part of the weight's gradient is rounded before it is added
        of_chunk = max(14 * s.c * s.W, 2 * s.W * s.h + 4 * s.c * s.W)
    return norm + gradient + of_chunk


def working_bytes(job: Job, shape: Shape, *, recomputed: bool) -> int:
    """At most needed beside what is kept while one layer goes backward.

    Args:
        job: the job.
        shape: of a micro-batch.
        recomputed: whether it is a layer of which the config computes something again.
    """
    s, moe, memory = _Sizes(job, shape), job.arch.moe, job.config.memory
    if moe is None:
        weights = 2 * s.f * s.h * s.e
        inner = max(3 * s.T * s.f * s.e, s.T * s.f * s.e + s.f * s.h * s.e, weights)
    else:
        copies = 4 if job.ep > 1 else 3
        inner = copies * s.N * job.etp * moe.top_k * s.h * s.e
    working = inner + s.N * s.h * s.e
    # One product less than without recomputation is alive when a recomputed MLP goes backward.
    product = s.T * s.f * s.e if moe is None else 0
    if recomputed and memory.recompute_granularity == "full":
        units = memory.recompute_num_layers or 1 if memory.recompute_method == "uniform" else 1
        return working + units * layer_bytes(job, shape, kept="all") + s.N * s.h * s.e - product
    if recomputed:
        return working + mlp_bytes(job, shape) - mlp_bytes(job, shape, inner=False) - product
    return working


def under_way(job: Job, shape: Shape, pp_rank: int) -> list[int]:
    """Micro-batches of each virtual stage whose activations are there at the same time."""
    m = shape.num_microbatches
    if job.vp == 1:
        return [min(m, job.pp - pp_rank)]
    warmup = (job.pp - pp_rank - 1) * 2 + (job.vp - 1) * job.pp
    number = min(m * job.vp, warmup + 1)
    counts = [0] * job.vp
    for index in range(number):
        counts[index % (job.pp * job.vp) // job.pp] += 1
    return counts


def update_bytes(job: Job, shape: Shape, pp_rank: int) -> Activations:
    """At the peak of an update, of a rank of a pipeline stage."""
    s = _Sizes(job, shape)
    counts, layers = under_way(job, shape, pp_rank), layers_of_rank(job, pp_rank)
    kept = sum(
        count * stage_bytes(job, shape, of_chunk)
        for count, of_chunk in zip(counts, layers, strict=True)
    )
    between = 0
    if job.pp > 1:
        # What came from the stage before and went to the next one, and its gradient.
        sent = 1 if s.e == 4 else 2
        between = (sum(counts) * sent + 1) * s.N * s.h * s.e
    buffer = s.T * s.h * s.e if job.config.parallel.sequence_parallel else 0
    small = sum(counts) * s.T * _FEW + s.columns * job.arch.head_dim * 4
    head = head_bytes(job, shape) if pp_rank == job.pp - 1 else 0
    rest = between + buffer + small
    # The head is done, and its memory given back, when layers go backward.
    moments = [Activations(kept, head, rest)]
    whole, memory = 0, job.config.memory
    if memory.recompute_method == "block":
        whole = max(0, layers[-1] - (memory.recompute_num_layers or 0))
    recomputes = memory.recompute_granularity is not None
    if whole or not recomputes:
        working = working_bytes(job, shape, recomputed=False)
        moments.append(Activations(kept, 0, working + rest))
    if recomputes:  # of a block come first the layers that were kept, and are then gone
        working = working_bytes(job, shape, recomputed=True)
        gone = whole * layer_bytes(job, shape, kept="all")
        moments.append(Activations(kept - gone, 0, working + rest))
    return max(moments, key=lambda moment: moment.total)


def forward_bytes(job: Job, shape: Shape, pp_rank: int) -> int:
    """At the peak of a pass without gradients: one layer's MLP, or the log-probs."""
    s, moe = _Sizes(job, shape), job.arch.moe
    if moe is None:
        inner = s.T * 4 * s.f * s.e
    else:
        columns = moe.intermediate_size // job.etp
        inner = s.N * job.etp * moe.top_k * (4 * columns + 2 * s.h) * s.e
    layer = inner + 3 * s.N * s.h * s.e
    if pp_rank < job.pp - 1:
        return layer
    tokens = s.T if s.c is None else s.c
    return max(layer, tokens * s.W * (s.e + 8) + s.T * s.h * s.e)
