"""Whole tensors from their shards, on every rank, a bucket of rows at a time.

A bucket is a run of rows in layer order that together have a set size. Shards travel first and are
joined last, so that what crosses stages is 1 / TP of the weights:

    own shards --broadcast over EP, then PP--> all shards of this TP rank --all-gather over TP-->
    all shards --layout--> whole tensors, one row after the other

Per bucket that is one all-gather for each group that shares rows (TP, and the experts' TP), and
one broadcast for each run of rows with one owner. A rank holds the shards of one bucket (its size)
and, until they are gathered, its own part of them (1 / TP of it). Where nothing has to travel and
nothing is cut, tensors are views of the parameters.

Every bucket has memory of its own: a tensor that was yielded is never written again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from math import prod
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.conversion.layouts import Layout
from gdpo_megatron.distributed.mesh import Mesh

Owner = TypeVar("Owner")


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedRow:
    """A row of the mapping as the stream needs it; equal on all ranks but for `shard`.

    Args:
        layout: between the shards and the tensors.
        shapes: of the tensors.
        pp_rank: pipeline rank that holds it.
        ep_rank: expert-parallel rank that holds it; None for all.
        shard: makes this rank's part, contiguous or not; None where the row is not held.
    """

    layout: Layout
    shapes: tuple[tuple[int, ...], ...]
    pp_rank: int
    ep_rank: int | None
    shard: Callable[[], Tensor] | None

    @property
    def numel(self) -> int:
        """Of its whole tensors."""
        return sum(map(prod, self.shapes))


class WeightStream:
    """Joins shards over the trainer's mesh.

    Args:
        arch: of the model.
        mesh: the trainer's mesh.
        dtype: of all shards.
        device: where they are.
    """

    def __init__(
        self, arch: ModelArchitecture, mesh: Mesh, dtype: torch.dtype, device: torch.device
    ):
        self._arch, self._mesh, self._dtype, self._device = arch, mesh, dtype, device

    def whole(self, rows: Iterable[StreamedRow], bucket_bytes: int) -> Iterator[list[Tensor]]:
        """The tensors of each row, on every rank; collective over the mesh.

        Args:
            rows: the same on all ranks, in the same order.
            bucket_bytes: of whole tensors; a row that is larger has a bucket of its own.
        """
        for bucket in buckets(rows, bucket_bytes // self._dtype.itemsize):
            yield from self._bucket(bucket)

    def _bucket(self, bucket: Sequence[StreamedRow]) -> Iterator[list[Tensor]]:
        dense = [row for row in bucket if row.ep_rank is None]
        experts = [row for row in bucket if row.ep_rank is not None]
        mesh = self._mesh
        joined = {
            False: self._joined(dense, mesh.tp_group),
            True: self._joined(experts, mesh.etp_group),
        }
        for row in bucket:
            full = next(joined[row.ep_rank is not None])
            yield [tensor.contiguous() for tensor in row.layout.split(full, self._arch)]

    def _joined(self, rows: Sequence[StreamedRow], group: ProcessGroup) -> Iterator[Tensor]:
        """The full tensor of each row, in Megatron's layout; `group` shares the rows."""
        if not rows:
            return
        mesh, size = self._mesh, group.size()
        travels = mesh.pp_size > 1 or (rows[0].ep_rank is not None and mesh.ep_size > 1)
        if size == 1 and not travels:
            for row in rows:
                assert row.shard is not None
                yield row.shard()
            return
        shapes = [_shard_shape(r.layout, r.shapes, self._arch, mesh.tp_size, size) for r in rows]
        gathered = self._gathered(rows, [prod(shape) for shape in shapes], group, travels)
        start = 0
        for row, shape in zip(rows, shapes, strict=True):
            shards = [part[start : start + prod(shape)].view(shape) for part in gathered]
            start += prod(shape)
            # What all ranks hold is this rank's own: should it differ, the engine gets what is here
            # and the checksums (of the first rank's) say so.
            own = shards[group.rank()]
            yield own if row.layout.tp_dim is None else row.layout.unshard(shards)

    def _gathered(
        self,
        rows: Sequence[StreamedRow],
        sizes: Sequence[int],
        group: ProcessGroup,
        travels: bool,
    ) -> Tensor:
        """[ranks of the group, elements of all shards], row after row."""
        local = torch.empty(sum(sizes), dtype=self._dtype, device=self._device)
        for row, part in zip(rows, local.split(list(sizes)), strict=True):
            if row.shard is not None:
                part.copy_(row.shard().reshape(-1))
        if travels:
            self._send_round(rows, sizes, local)
        if group.size() == 1:
            return local.unsqueeze(0)
        gathered = local.new_empty(group.size(), local.numel())
        dist.all_gather_into_tensor(gathered.view(-1), local, group=group)
        return gathered

    def _send_round(self, rows: Sequence[StreamedRow], sizes: Sequence[int], local: Tensor) -> None:
        """Bring the shards of all stages and expert-parallel ranks to this rank."""
        mesh = self._mesh
        if mesh.ep_size > 1 and rows[0].ep_rank is not None:
            for (pp_rank, ep_rank), part in _runs(
                [(row.pp_rank, row.ep_rank) for row in rows], sizes, local
            ):
                if pp_rank == mesh.pp_rank:
                    assert ep_rank is not None
                    source = dist.get_global_rank(mesh.ep_group, ep_rank)
                    dist.broadcast(part, source, group=mesh.ep_group)
        if mesh.pp_size > 1:
            for pp_rank, part in _runs([row.pp_rank for row in rows], sizes, local):
                source = dist.get_global_rank(mesh.pp_group, pp_rank)
                dist.broadcast(part, source, group=mesh.pp_group)


def buckets(rows: Iterable[StreamedRow], bucket_numel: int) -> Iterator[list[StreamedRow]]:
    """Runs of rows, each of at most `bucket_numel` elements or of one row."""
    bucket: list[StreamedRow] = []
    filled = 0
    for row in rows:
        if bucket and filled + row.numel > bucket_numel:
            yield bucket
            bucket, filled = [], 0
        bucket.append(row)
        filled += row.numel
    if bucket:
        yield bucket


def _runs(
    owners: Sequence[Owner], sizes: Sequence[int], local: Tensor
) -> Iterator[tuple[Owner, Tensor]]:
    """For each run of rows with one owner, the owner and the part of `local` that they fill."""
    start = 0
    for owner, run in groupby(zip(owners, sizes, strict=True), key=lambda pair: pair[0]):
        size = sum(it for _, it in run)
        yield owner, local[start : start + size]
        start += size


@lru_cache(maxsize=1024)
def _shard_shape(
    layout: Layout,
    shapes: tuple[tuple[int, ...], ...],
    arch: ModelArchitecture,
    tp_size: int,
    group_size: int,
) -> torch.Size:
    """Shape of a rank's part, asked of the layout itself."""
    tensors = [torch.empty(shape, device="meta") for shape in shapes]
    return layout.shard(layout.merge(tensors, arch, tp_size), 0, group_size).shape
