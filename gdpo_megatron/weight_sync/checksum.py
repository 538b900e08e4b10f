"""Checksums of Hugging Face tensors that shards of any layout add up to.

    checksum = sum over r, c of word(r, c) * f(r) * g(c)  mod 2^64

The tensor is a matrix (first dimension by all others; a vector is one column), its words are its
bits read as int32 (two elements where they have 16 bits and the columns are even; else one), and f
and g are odd 64-bit hashes of row and column. An odd factor loses no bit, so any change of one word
is seen; words that have changed places are, because every place has a factor of its own.

A sum does not ask who adds what: each TP rank sums over its own elements, with the factors of their
places in the whole tensor, and an all-reduce completes it. Where a rank's elements belong is asked
of the layouts, by sending row numbers through `merge` and `shard` as if they were weights. The
receiver's sum is over the whole tensor, which came by `unshard` and `split`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.conversion.layouts import Layout
from gdpo_megatron.conversion.mapping import Row, mapping_rows

if TYPE_CHECKING:  # which needs Megatron
    from gdpo_megatron.policy.weights import ShardedWeights

_CHUNK_WORDS = 2**18
"""Words that are multiplied at a time: what a checksum needs of memory is twice 8 bytes of each."""

_WORD_BITS = 64
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_ROWS, _COLUMNS = 0x243F6A8885A308D3, 0x13198A2E03707344
_TENSOR_STEP = 1 << 40  # rows of a tensor are fewer


def _signed(word: int) -> int:
    """A 64-bit pattern as the int64 that has it."""
    return word - (1 << _WORD_BITS) if word >> (_WORD_BITS - 1) else word


def _mix(x: Tensor, shift: int, factor: int) -> Tensor:
    # int64 shifts are arithmetic, so the sign bits are masked off.
    shifted = (x >> shift) & ((1 << (_WORD_BITS - shift)) - 1)
    return (x ^ shifted) * _signed(factor)


def _factors(places: Tensor, stream: int) -> Tensor:
    """An odd hash of each int64 (splitmix64), other ones for each stream."""
    x = places * _signed(_GOLDEN) + _signed(stream)
    x = _mix(_mix(x, 30, _MIX_1), 27, _MIX_2)
    return _mix(x, 31, 1) | 1


@dataclass(frozen=True, slots=True)
class TensorSum:
    """How a tensor's words are read and weighted.

    Args:
        shape: of the whole tensor.
        word: int32, or int16 where elements of 16 bits do not come in pairs.
    """

    shape: tuple[int, ...]
    word: torch.dtype

    def of(self, tensor: Tensor) -> Tensor:
        """Checksum of a whole tensor: int64 scalar on its device."""
        rows, columns = _factors_of_whole(self.shape, self._elements(tensor), tensor.device)
        return (_row_sums(tensor, self.word, columns) * rows).sum()

    def _elements(self, tensor: Tensor) -> int:
        return self.word.itemsize // tensor.element_size()


def tensor_sums(weights: ShardedWeights, dtype: torch.dtype) -> dict[str, TensorSum]:
    """How each Hugging Face tensor of a model is summed; the same on all ranks."""
    return {
        name: TensorSum(shape, _word(row, weights.shard_group(row).size(), dtype))
        for row in mapping_rows(weights.arch)
        if not row.import_only
        for name, shape in zip(row.hf, row.shapes, strict=True)
    }


def _word(row: Row, num_shards: int, dtype: torch.dtype) -> torch.dtype:
    """The largest word that a shard of every tensor of a row is made of."""
    columns = [_num_columns(shape) for shape in row.shapes]
    if row.layout.tp_dim == 1:
        columns = [number // num_shards for number in columns]
    if all(number * dtype.itemsize % 4 == 0 for number in columns):
        return torch.int32
    return torch.int16


def policy_sums(weights: ShardedWeights, sums: dict[str, TensorSum]) -> Tensor:
    """Checksums of what a replica of the policy holds; collective over its mesh.

    Args:
        weights: the policy.
        sums: see tensor_sums.

    Returns:
        int64 [tensors], in the order of `sums`; equal on all ranks of the replica.
    """
    mesh, device = weights.mesh, weights.platform.device
    place = {name: i for i, name in enumerate(sums)}
    dense = torch.zeros(len(sums), dtype=torch.int64, device=device)
    experts = torch.zeros_like(dense)
    for row, shard in weights.own_shards():
        group = weights.shard_group(row)
        if row.layout.tp_dim is None and group.rank():
            continue  # what all ranks hold counts once
        first, table = place[row.hf[0]], dense if row.expert is None else experts
        table[first : first + len(row.hf)] = shard_sums(
            shard, row, sums[row.hf[0]].word, weights.arch, mesh.tp_size, group.rank(), group.size()
        )
    # Each part of the model is once in each of these groups; gloo's and NCCL's int64 sums wrap.
    for table, groups in (
        (dense, (mesh.tp_group, mesh.pp_group)),
        (experts, (mesh.etp_group, mesh.ep_group, mesh.pp_group)),
    ):
        for group in groups:
            if group.size() > 1:
                dist.all_reduce(table, group=group)
    return dense + experts


def shard_sums(
    shard: Tensor,
    row: Row,
    word: torch.dtype,
    arch: ModelArchitecture,
    tp_size: int,
    rank: int,
    size: int,
) -> Tensor:
    """[tensors of the row]: what a rank's part adds to each checksum."""
    elements = word.itemsize // shard.element_size()
    which, rows, columns = _factors_of_shard(
        row.layout, row.shapes, arch, tp_size, rank, size, elements, shard.device
    )
    sums = torch.zeros(len(row.hf), dtype=torch.int64, device=shard.device)
    return sums.index_add_(0, which, _row_sums(shard, word, columns) * rows)


def _row_sums(tensor: Tensor, word: torch.dtype, columns: Tensor) -> Tensor:
    """[R]: sums over the columns, weighted."""
    matrix = tensor.reshape(tensor.shape[0], -1)
    step = max(1, _CHUNK_WORDS // len(columns))
    return torch.cat([(part * columns).sum(1) for part in _words(matrix, word, step)])


def _words(matrix: Tensor, word: torch.dtype, step: int) -> Iterator[Tensor]:
    for part in matrix.split(step):
        part = part.contiguous()
        if part.storage_offset() * part.element_size() % word.itemsize:
            part = part.clone()  # begins within a word
        yield part.view(word).to(torch.int64)


def _num_columns(shape: tuple[int, ...]) -> int:
    return torch.Size(shape[1:]).numel()


@lru_cache(maxsize=64)
def _factors_of_whole(
    shape: tuple[int, ...], elements: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Factors of rows and columns; a column has so many elements."""
    rows, columns = torch.arange(shape[0]), torch.arange(_num_columns(shape) // elements)
    return _factors(rows, _ROWS).to(device), _factors(columns, _COLUMNS).to(device)


@lru_cache(maxsize=64)
def _factors_of_shard(
    layout: Layout,
    shapes: tuple[tuple[int, ...], ...],
    arch: ModelArchitecture,
    tp_size: int,
    rank: int,
    size: int,
    elements: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of a shard its tensor and its factor, 0 for padding; and those of columns."""
    numbers = [
        (tensor * _TENSOR_STEP + torch.arange(shape[0]) + 1).unsqueeze(1)
        for tensor, shape in enumerate(shapes)
    ]
    rows = layout.merge(numbers, arch, tp_size)
    columns = torch.arange(_num_columns(shapes[0]) // elements).unsqueeze(0)
    if layout.tp_dim == 1:
        columns = layout.shard(columns, rank, size)
    else:
        rows = layout.shard(rows, rank, size)
    rows = rows[:, 0]
    which, place = rows // _TENSOR_STEP, rows % _TENSOR_STEP - 1
    factors = _factors(place, _ROWS).masked_fill(rows == 0, 0)
    return which.to(device), factors.to(device), _factors(columns[0], _COLUMNS).to(device)
