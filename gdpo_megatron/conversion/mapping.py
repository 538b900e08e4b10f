"""One table between Hugging Face tensors and Megatron parameters: import, export, weight sync.

A row says which Megatron parameter holds which Hugging Face tensors, and how: `merge` makes the
full Megatron tensor, `split` undoes it, `shard` cuts out a tensor-parallel rank's part and
`unshard` joins the parts. Each pair is its own inverse, so the three uses cannot drift apart.

Shapes: h hidden size, n query heads, g key/value heads (groups), d head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

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
    """q [n*d, h], k [g*d, h], v [g*d, h] -> per group its queries, key and value: [(n+2g)*d, h]."""

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
        return torch.cat([tensor, tensor.new_zeros(padding, *tensor.shape[1:])], 0)

    def split(self, full: Tensor, arch: ModelArchitecture) -> list[Tensor]:
        return [full[: arch.vocab_size]]


@dataclass(frozen=True)
class Row:
    """One Megatron parameter: its names, the Hugging Face names, and the layout between them.

    `layer` is the global layer the row belongs to; None for `first` (embedding) and `last` (final
    norm, output layer) which live on the first and last pipeline stage.
    """

    megatron: tuple[str, ...]
    """Local spec name, then the Transformer Engine spec's where it differs."""
    hf: tuple[str, ...]
    layout: Layout
    layer: int | None = None
    last: bool = False
    import_only: bool = False
    """A second copy of a tied embedding, which the last of several stages holds for its softmax."""


_EMBEDDING = "model.embed_tokens.weight"

# Megatron names (local spec | TE spec), Hugging Face names, layout; below `decoder.layers.<i>.` and
# `model.layers.<L>.`. TE fuses a norm into the linear layer that follows it.
_LAYER_ROWS: tuple[tuple[str, str, Layout], ...] = (
    (
        "input_layernorm.weight|self_attention.linear_qkv.layer_norm_weight",
        "input_layernorm.weight",
        Copy(),
    ),
    (
        "self_attention.linear_qkv.weight",
        "self_attn.q_proj.weight|self_attn.k_proj.weight|self_attn.v_proj.weight",
        QKV(),
    ),
    ("self_attention.linear_proj.weight", "self_attn.o_proj.weight", Copy(1)),
    (
        "pre_mlp_layernorm.weight|mlp.linear_fc1.layer_norm_weight",
        "post_attention_layernorm.weight",
        Copy(),
    ),
    ("mlp.linear_fc1.weight", "mlp.gate_proj.weight|mlp.up_proj.weight", GatedMLP(0)),
    ("mlp.linear_fc2.weight", "mlp.down_proj.weight", Copy(1)),
)


def mapping_rows(arch: ModelArchitecture) -> list[Row]:
    """All rows of a model in layer order: embedding, layers, final norm, output layer."""
    rows = [Row(("embedding.word_embeddings.weight",), (_EMBEDDING,), Vocabulary())]
    for layer in range(arch.num_layers):
        for megatron, hf, layout in _LAYER_ROWS:
            rows.append(
                Row(
                    tuple(megatron.split("|")),
                    tuple(f"model.layers.{layer}.{name}" for name in hf.split("|")),
                    layout,
                    layer=layer,
                )
            )
    rows.append(Row(("decoder.final_layernorm.weight",), ("model.norm.weight",), Copy(), last=True))
    tied = arch.tie_word_embeddings
    output = _EMBEDDING if tied else "lm_head.weight"
    rows.append(Row(("output_layer.weight",), (output,), Vocabulary(), last=True, import_only=tied))
    return rows


def hf_shapes(arch: ModelArchitecture) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Hugging Face checkpoint of `arch`, with its shape, in layer order."""
    h, f, d = arch.hidden_size, arch.intermediate_size, arch.head_dim
    query, key = arch.num_attention_heads * d, arch.num_key_value_heads * d
    by_module = {
        "embed_tokens": (arch.vocab_size, h),
        "lm_head": (arch.vocab_size, h),
        "q_proj": (query, h),
        "k_proj": (key, h),
        "v_proj": (key, h),
        "o_proj": (h, query),
        "gate_proj": (f, h),
        "up_proj": (f, h),
        "down_proj": (h, f),
        "norm": (h,),
        "input_layernorm": (h,),
        "post_attention_layernorm": (h,),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for row in mapping_rows(arch):
        for name in row.hf:
            shapes[name] = by_module[name.split(".")[-2]]
    return shapes
