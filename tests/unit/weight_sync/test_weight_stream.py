"""Buckets: which rows share one, and how much memory the joining of shards takes.

One process; a group of two whose second rank has the same shards. That ranks get the right tensors
by the right number of collectives is in tests/distributed/test_weight_sync.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.peak_memory import peak_bytes
from torch import Tensor

from gdpo_megatron.conversion.layouts import Copy
from gdpo_megatron.policy.weight_stream import StreamedRow, WeightStream, buckets


def row(numel: int) -> StreamedRow:
    shard = torch.arange(float(numel // 2)).view(-1, 4)
    return StreamedRow(
        layout=Copy(0), shapes=((numel // 4, 4),), pp_rank=0, ep_rank=None, shard=lambda: shard
    )


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ([8, 8, 8], 16, [[8, 8], [8]]),
        ([8, 8, 8], 24, [[8, 8, 8]]),
        ([8, 40, 8, 8], 16, [[8], [40], [8, 8]]),
        ([8, 16], 1, [[8], [16]]),
        ([], 16, []),
    ],
)
def test_rows_share_a_bucket_in_their_order(
    sizes: list[int], limit: int, expected: list[list[int]]
):
    found = [[it.numel for it in bucket] for bucket in buckets(map(row, sizes), limit)]
    assert found == expected


class TwoRanks:
    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 0


def stream() -> WeightStream:
    group = TwoRanks()
    mesh: Any = SimpleNamespace(
        tp_group=group, etp_group=group, tp_size=2, pp_size=1, pp_rank=0, ep_size=1, ep_rank=0
    )
    arch: Any = None  # this layout asks nothing of it
    return WeightStream(arch, mesh, torch.float32, torch.device("cpu"))


def gather(output: Tensor, own: Tensor, group: Any) -> None:
    output.view(2, -1).copy_(own)


@pytest.mark.parametrize(
    ("num_rows_of_a_bucket", "rows_at_a_time"),
    # While it is gathered: the shards of both ranks and this rank's, and the last row that was
    # drawn. While it is drawn: the shards of both, the last row and the next.
    [(1, 3), (2, 4), (4, 7), (8, 13)],
)
def test_memory(num_rows_of_a_bucket: int, rows_at_a_time: int):
    """A bucket, half of it again for the own shards, and one row; never the model."""
    numel = 2**14
    rows = [row(numel) for _ in range(16)]
    bucket_bytes = num_rows_of_a_bucket * numel * 4

    def draw() -> None:
        for _ in stream().whole(rows, bucket_bytes):
            pass

    with mock.patch.object(dist, "all_gather_into_tensor", gather):
        drawn = [tensor.clone() for (tensor,) in stream().whole(rows, bucket_bytes)]
        peak = peak_bytes(draw)
    whole = torch.arange(numel / 2).view(-1, 4).repeat(2, 1)
    assert len(drawn) == 16 and all(torch.equal(it, whole) for it in drawn)
    assert peak == rows_at_a_time * numel * 4


def test_a_bucket_is_not_written_again():
    """An engine may keep what it was given until the end."""
    rows = [row(64) for _ in range(6)]
    with mock.patch.object(dist, "all_gather_into_tensor", gather):
        kept = [tensor for (tensor,) in stream().whole(rows, 2 * 64 * 4)]
    copies = [tensor.clone() for tensor in kept]
    assert len({tensor.data_ptr() for tensor in kept}) == 6
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
