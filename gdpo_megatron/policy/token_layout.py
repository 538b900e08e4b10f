"""How the rows of a micro-batch lie in the model, and how its results come back to rows.

    PaddedRows   [b, S]: rows side by side, padded on the right; each context-parallel rank has its
                 part of every row
    PackedRows   [1, t]: rows end to end, without padding between them (Megatron's "thd"); positions
                 start anew in each row, and attention stays within it

Only the model sees the difference: losses and metrics get [b, S] in either case.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Protocol

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.distributed import ProcessGroup

from gdpo_megatron.data.batching import MicroBatch
from gdpo_megatron.policy.context_parallel import gather_rows, own_tokens


class TokenLayout(Protocol):
    """A micro-batch's way into the model and out of it."""

    @property
    def packed_seq_params(self) -> PackedSeqParams | None:
        """Where rows begin, for a model that cannot see it from the shape."""
        ...

    def own(self, x: Tensor) -> Tensor:
        """What this rank's model gets of [b, S]."""
        ...

    def rows(self, values: Tensor) -> Tensor:
        """[b, S] of values that were computed for what `own` returns; differentiable."""
        ...


class PaddedRows:
    """Rows side by side.

    Args:
        batch: b rows of S positions.
        shape: rows and columns after padding; at least the batch's own.
        cp_group: ranks that share each row.
    """

    packed_seq_params: PackedSeqParams | None = None

    def __init__(self, batch: MicroBatch, shape: tuple[int, int], cp_group: ProcessGroup):
        self._shape, self._cp_group = batch.tokens.shape, cp_group
        (b, s), (rows, columns) = self._shape, shape
        self._padding = (0, columns - s, 0, rows - b)

    def own(self, x: Tensor) -> Tensor:
        return own_tokens(F.pad(x, self._padding), self._cp_group)

    def rows(self, values: Tensor) -> Tensor:
        b, s = self._shape
        return gather_rows(values, self._cp_group)[:b, :s]


class PackedRows:
    """Rows end to end.

    Args:
        batch: b rows of S positions.
        length: of the pack, at least its rows together; what is left is a last row of its own.
    """

    packed_seq_params: PackedSeqParams | None

    def __init__(self, batch: MicroBatch, length: int):
        self._shape, device = batch.tokens.shape, batch.tokens.device
        taken = torch.arange(self._shape[1], device=device) < batch.lengths[:, None]
        self._places = taken.flatten().nonzero()[:, 0]
        self._padding = length - len(self._places)
        assert self._padding >= 0
        segments = batch.lengths.tolist() + [self._padding] * (self._padding > 0)
        ends = torch.tensor([0, *accumulate(segments)], dtype=torch.int32, device=device)
        # Megatron's rotary positions start anew in a row unless the longest is the whole pack.
        self.packed_seq_params = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=max(segments),
            max_seqlen_kv=max(segments),
        )

    def own(self, x: Tensor) -> Tensor:
        return F.pad(x.flatten()[self._places], (0, self._padding))[None]

    def rows(self, values: Tensor) -> Tensor:
        packed = values[0, : len(self._places)]
        whole = packed.new_zeros(self._shape.numel())
        return whole.index_copy(0, self._places, packed).view(self._shape)
