"""What a rank holds between two passes, to the byte: parameters, gradients, optimizer state.

The sizes are those of Megatron's buffers (`_ParamAndGradBuffer`): parameters in reverse order, each
from a multiple of 64 elements on, a bucket's end padded to a multiple of lcm(ranks, 128). Ranks
that hold the same parameters share the optimizer's state of each bucket in equal parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from gdpo_megatron.config.lora import LoraConfig
from gdpo_megatron.config.schema import ParallelConfig
from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.conversion.layouts import Vocabulary
from gdpo_megatron.conversion.mapping import hf_shapes
from gdpo_megatron.conversion.tables import LayerRow
from gdpo_megatron.planning.job import Job, layers_of_rank

_PARAMETER_START, _BUCKET_END = 64, 128


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes of a rank.

    Args:
        num_parameters: that are trained or not, the vocabulary's padding included.
        parameters: the model's.
        gradients: float32, of what is trained.
        optimizer: both moments in float32, and main weights where parameters have fewer bits; the
            most that a data-parallel rank has.
        own_parameters: those that this rank updates, which is what a swapped reference keeps.
    """

    num_parameters: int
    parameters: int
    gradients: int
    optimizer: int
    own_parameters: int


def model_parameters(job: Job) -> int:
    """Parameters of the model, as its config.json says."""
    return _of_architecture(job.arch)


@lru_cache(maxsize=16)
def _of_architecture(arch: ModelArchitecture) -> int:
    return sum(math.prod(shape) for shape in hf_shapes(arch).values())


@dataclass(frozen=True, slots=True)
class _StateOf:
    """All that the state depends on: layouts of engines are searched beside one of the trainer."""

    arch: ModelArchitecture
    parallel: ParallelConfig
    lora: LoraConfig | None
    dtype_bytes: int
    world_size: int
    pp_rank: int
    job: Job = field(compare=False)


def held_by(job: Job, pp_rank: int) -> Held:
    """What a rank of a pipeline stage holds; the same for all tensor- and expert-parallel ones."""
    config = job.config
    return _held_by(
        _StateOf(
            job.arch,
            config.parallel,
            config.model.lora,
            job.dtype_bytes,
            job.world_size,
            pp_rank,
            job,
        )
    )


@lru_cache(maxsize=256)
def _held_by(it: _StateOf) -> Held:
    job, pp_rank = it.job, it.pp_rank
    lora = job.config.model.lora
    count = parameters = gradients = optimizer = own_parameters = 0
    for chunk, layers in enumerate(layers_of_rank(job, pp_rank)):
        dense = list(_dense(job, chunk, pp_rank, layers))
        experts = list(_experts(job, layers))
        count += sum(dense) + sum(experts)
        if lora is not None:
            adapters = list(_adapters(job, layers))
            count += sum(adapters)
            # Adapters are few: buckets are as good as one, and what is frozen is in none.
            parameters += (sum(dense) + sum(experts)) * job.dtype_bytes
            buffers = [(adapters, job.dp * job.cp)]
        else:
            buffers = [(dense, job.dp * job.cp), (experts, job.expert_dp)]
        for sizes, ranks in buffers:
            whole, own = _buffer(job, sizes, ranks, pp_rank)
            parameters += whole * job.dtype_bytes
            gradients += whole * 4
            optimizer += own * (12 if job.dtype_bytes == 2 else 8)
            own_parameters += own * job.dtype_bytes
    return Held(count, parameters, gradients, optimizer, own_parameters)


def _buffer(job: Job, sizes: list[int], ranks: int, pp_rank: int) -> tuple[int, int]:
    """Elements of a buffer, and of the first rank's part without padding."""
    limit = math.inf
    if job.config.parallel.overlap_grad_reduce and pp_rank == 0:
        limit = max(40_000_000, 1_000_000 * job.dp * job.cp)
    divisor = math.lcm(ranks, _BUCKET_END)
    if limit == math.inf and not any(size % _PARAMETER_START for size in set(sizes)):
        elements = sum(sizes)  # nothing is padded but the end: experts are tens of thousands
        closed = _up(elements, divisor)
        return closed, min(elements, closed // ranks)
    end = begin = own = 0
    spans: list[tuple[int, int]] = []
    for number, size in enumerate(reversed(sizes), start=1):
        start = _up(end, _PARAMETER_START)
        end = start + size
        spans.append((start, end))
        if end - begin >= limit or number == len(sizes):
            closed = _up(end, divisor)
            part = begin + (closed - begin) // ranks
            own += sum(min(last, part) - min(first, part) for first, last in spans)
            begin = end = closed
            spans.clear()
    return end, own


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _dense(job: Job, chunk: int, pp_rank: int, layers: int) -> Iterator[int]:
    """Sizes of this rank's parameters that are no experts', in the model's order."""
    arch, stage = job.arch, chunk * job.pp + pp_rank
    last = stage == job.pp * job.vp - 1
    vocabulary = arch.padded_vocab_size(job.tp) * arch.hidden_size // job.tp
    if stage == 0:
        yield vocabulary
    of_layer = [_size(job, row, job.tp) for row in arch.layer_rows if not row.per_expert]
    yield from of_layer * layers
    if last:
        yield arch.hidden_size
        if not arch.tie_word_embeddings or job.pp * job.vp > 1:
            yield vocabulary


def _experts(job: Job, layers: int) -> Sequence[int]:
    if job.arch.moe is None:
        return ()
    of_expert = [_size(job, row, job.etp) for row in job.arch.layer_rows if row.per_expert]
    return of_expert * (layers * job.arch.moe.num_experts // job.ep)


def _size(job: Job, row: LayerRow, parts: int) -> int:
    assert not isinstance(row.layout, Vocabulary)
    whole = sum(math.prod(map(job.arch.size_of, shape)) for _, shape in row.tensors)
    return whole if row.layout.tp_dim is None else whole // parts


def _adapters(job: Job, layers: int) -> Iterator[int]:
    """Of every layer's targets A and B (policy/lora.py): the one cut, the other whole."""
    lora, arch = job.config.model.lora, job.arch
    assert lora is not None
    for _ in range(layers):
        for row in arch.layer_rows:
            target = row.megatron.split("|")[0].split(".")[-2]
            if row.per_expert or target not in lora.target_modules or len(row.tensors[0][1]) != 2:
                continue
            shapes = [[arch.size_of(letter) for letter in shape] for _, shape in row.tensors]
            columns, rows = shapes[0][1], sum(shape[0] for shape in shapes)
            if row.layout.tp_dim == 1:
                columns //= job.tp
            else:
                rows //= job.tp
            yield lora.rank * columns
            yield rows * lora.rank
