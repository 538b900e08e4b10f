"""How Megatron lays a Hugging Face tensor out, and back: merge and split, shard and unshard.

`merge` makes the full Megatron tensor, `split` undoes it, `shard` cuts out a tensor-parallel rank's
part and `unshard` joins the parts. Each pair is its own inverse, so import, export and weight sync
cannot drift apart.

Shapes: h hidden size, n query heads, g key/value heads (groups), d head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:  # the architecture carries its family's table, which is made of layouts
    from gdpo_megatron.conversion.architecture import ModelArchitecture


class Layout(Protocol):
    """How a full Megatron tensor relates to its Hugging Face tensors and to its TP shards."""

    @property
    def tp_dim(self) -> int | None:
        """Dimension that TP ranks share; None if all of them hold the whole."""
        ...

    def merge(self, tensors: Sequence[Tensor], arch: ModelArchitecture, tp: int) -> Tensor: ...
    def split(self, full: Tensor, arch: ModelArchitecture) -> list[Tensor]: ...
    def shard(self, full: Tensor, rank: int, tp: int) -> Tensor: ...
    def unshard(self, shards: Sequence[Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class Copy:
    """The tensor as it is; `tp_dim` is the dimension that TP ranks share, None if all hold it."""

    tp_dim: int | None = None

    def merge(self, tensors: Sequence[Tensor], arch: ModelArchitecture, tp: int) -> Tensor:
        (tensor,) = tensors
        return tensor

    def split(self, full: Tensor, arch: ModelArchitecture) -> list[Tensor]:
        return [full]

    def shard(self, full: Tensor, rank: int, tp: int) -> Tensor:
        return full if self.tp_dim is None else full.chunk(tp, self.tp_dim)[rank]

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        return shards[0] if self.tp_dim is None else torch.cat(list(shards), self.tp_dim)


@dataclass(frozen=True)
class QKV(Copy):
    """q [n*d, ...], k [g*d, ...], v [g*d, ...] -> per group its queries, key and value.

    The trailing dimension is h for weights and none for biases.
    """

    tp_dim: int | None = 0

    def merge(self, tensors: Sequence[Tensor], arch: ModelArchitecture, tp: int) -> Tensor:
        groups = arch.num_key_value_heads
        rest = tensors[0].shape[1:]
        return torch.cat([t.reshape(groups, -1, *rest) for t in tensors], 1).reshape(-1, *rest)

    def split(self, full: Tensor, arch: ModelArchitecture) -> list[Tensor]:
        d, rest = arch.head_dim, full.shape[1:]
        queries = arch.num_attention_heads // arch.num_key_value_heads * d
        grouped = full.reshape(arch.num_key_value_heads, queries + 2 * d, *rest)
        return [t.reshape(-1, *rest) for t in grouped.split([queries, d, d], 1)]


@dataclass(frozen=True)
class GatedMLP(Copy):
    """gate [f, h] and up [f, h] -> [2f, h]; a rank holds its part of each half."""

    tp_dim: int | None = 0

    def merge(self, tensors: Sequence[Tensor], arch: ModelArchitecture, tp: int) -> Tensor:
        return torch.cat(list(tensors), 0)

    def split(self, full: Tensor, arch: ModelArchitecture) -> list[Tensor]:
        return list(full.chunk(2, 0))

    def shard(self, full: Tensor, rank: int, tp: int) -> Tensor:
        return torch.cat([half.chunk(tp, 0)[rank] for half in full.chunk(2, 0)], 0)

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        halves = [shard.chunk(2, 0) for shard in shards]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves], 0)


@dataclass(frozen=True)
class Vocabulary(Copy):
    """[V, h] -> [padded V, h]; the added rows are zero, masked in the softmax, not exported."""

    tp_dim: int | None = 0

    def merge(self, tensors: Sequence[Tensor], arch: ModelArchitecture, tp: int) -> Tensor:
        (tensor,) = tensors
        padding = arch.padded_vocab_size(tp) - tensor.shape[0]
        if not padding:
            return tensor
        return torch.cat([tensor, tensor.new_zeros(padding, *tensor.shape[1:])], 0)

    def split(self, full: Tensor, arch: ModelArchitecture) -> list[Tensor]:
        return [full[: arch.vocab_size]]
