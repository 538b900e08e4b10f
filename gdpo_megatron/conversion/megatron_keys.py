"""How a distributed checkpoint of Megatron names and stacks the parameters of the mapping.

`GPTModel.sharded_state_dict` of megatron-core gives every parameter a key and a global shape that
know no layout: layers lie along a first axis, experts along a second one, a tensor-parallel rank
holds a range of what follows. So a checkpoint is described by the mapping's rows alone, without a
model, a device or a process group:

    decoder.layers.mlp.linear_fc1.weight                [L, 2f, h]     row (layer)
    decoder.layers.mlp.experts.experts.linear_fc1.weight [L, E, 2e, h]  row (layer, expert)
    embedding.word_embeddings.weight                    [padded V, h]  the row itself

(L layers, E experts, the other letters as in tables.py.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.conversion.layouts import GatedMLP, Vocabulary
from gdpo_megatron.conversion.mapping import Row, mapping_rows

_LAYERS = "decoder.layers."
_LOCAL_EXPERT = "mlp.experts.local_experts.{expert}."
# The norm before a mixture of experts: Megatron's local spec files it under the name that it has
# where Transformer Engine fuses it, TE's spec under its own.
_NORM = "pre_mlp_layernorm.weight"
_ALSO = {_NORM: ("mlp.linear_fc1.layer_norm_weight", _NORM)}
_HALVES = ("_w", "_v")  # gate and up
# Modules with an `_extra_state`, which Megatron's loader wants to find. It is None unless a run
# uses fp8. Local spec: the linear layers; TE's attention has one as well.
_STATEFUL = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
)
_STATEFUL_MLP = ("mlp.linear_fc1", "mlp.linear_fc2")
_STATEFUL_EXPERT = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row lies: a slice of a stacked tensor.

    Args:
        key: name in the checkpoint.
        index: of the slice along the stacked axes: (), (layer,) or (layer, expert).
        stack: lengths of the stacked axes.
    """

    key: str
    index: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StoredRow:
    """One row of the mapping in a checkpoint.

    Args:
        row: of the mapping.
        places: where it is written; read from any of them.
        alternatives: where other savers put it: every layer under a key of its own, a gated MLP
            even under two, which are joined along the first dimension.
        shape: of the full Megatron tensor.
    """

    row: Row
    places: tuple[Place, ...]
    alternatives: tuple[tuple[Place, ...], ...]
    shape: tuple[int, ...]

    @property
    def num_parameters(self) -> int:
        """Values of the Hugging Face tensors."""
        return sum(math.prod(shape) for shape in self.row.shapes)

    @property
    def padded(self) -> bool:
        """Whether the first dimension may be longer than needed."""
        return isinstance(self.row.layout, Vocabulary)


def stored_rows(arch: ModelArchitecture) -> list[StoredRow]:
    """What a checkpoint holds, in layer order; a tied output layer is the embedding."""
    return [_stored(row, arch) for row in mapping_rows(arch) if not row.import_only]


def _stored(row: Row, arch: ModelArchitecture) -> StoredRow:
    # The layout itself says what shape it makes of its tensors.
    parts = [torch.empty(shape, device="meta") for shape in row.shapes]
    shape = tuple(row.layout.merge(parts, arch, 1).shape)
    name = row.megatron[-1]
    if row.layer is None:
        return StoredRow(row, (Place(name),), (), shape)
    names = _ALSO.get(name, (name,)) if arch.moe else (name,)
    index, stack, single = (row.layer,), (arch.num_layers,), f"{_LAYERS}{row.layer}."
    stacked, alone = names, names
    if row.expert is not None:
        assert arch.moe is not None
        index, stack = (row.layer, row.expert), (arch.num_layers, arch.moe.num_experts)
        stacked = tuple(n.replace(_LOCAL_EXPERT, "mlp.experts.experts.") for n in names)
        alone = tuple(n.replace(_LOCAL_EXPERT, f"mlp.experts.experts.{row.expert}.") for n in names)
    places = tuple(Place(_LAYERS + n, index, stack) for n in stacked)
    others = [(Place(single + n),) for n in alone]
    if row.expert is not None:
        others += [(Place(single + n, index[1:], stack[1:]),) for n in stacked]
    if isinstance(row.layout, GatedMLP):
        others += [tuple(Place(single + n + half) for half in _HALVES) for n in alone]
    return StoredRow(row, places, tuple(others), shape)


def extra_state_keys(arch: ModelArchitecture) -> Iterator[str]:
    """Keys of the objects that Megatron's loader asks for beside the parameters."""
    num_layers = arch.num_layers
    modules = _STATEFUL if arch.moe else _STATEFUL + _STATEFUL_MLP
    for layer in range(num_layers):
        for module in modules:
            yield f"{_LAYERS}{module}._extra_state/shard_{layer}_{num_layers}"
        if arch.moe:
            num_experts = arch.moe.num_experts
            for module in _STATEFUL_EXPERT:
                for expert in range(num_experts):
                    yield (
                        f"{_LAYERS}{module}._extra_state/"
                        f"shard_{layer}.{expert}_{num_layers}.{num_experts}"
                    )


def num_parameters(arch: ModelArchitecture) -> int:
    """Parameters of a model, without the padding of its vocabulary."""
    return sum(stored.num_parameters for stored in stored_rows(arch))
