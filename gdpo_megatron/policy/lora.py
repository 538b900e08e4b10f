"""LoRA: low-rank adapters beside the linear layers of a model whose own weights stay as they are.

    y = W x + alpha / rank * B (A x)                       (Hu et al. 2021, arXiv 2106.09685, eq. 3)

An adapter is cut over tensor-parallel ranks as its layer is, so that `B A` of a rank is what
belongs to its part of W:

                                        A                       B
    linear_qkv, linear_fc1 (columns)    [r, in] on every rank   [out / tp, r]
    linear_proj, linear_fc2 (rows)      [r, in / tp]            [out, r] on every rank

The factors that every rank holds get the same gradient on every rank, by one all-reduce of A x:
in the backward pass of the columns' A, in the forward pass of the rows' B. Under sequence
parallelism, where a rank has its tokens only of a columns' input and a rows' output, tokens are
gathered and scattered in that place, and Megatron sums the gradients of these factors over ranks.
Queries, keys and values share an A, and so do gate and up projection: they are one layer of
Megatron.

Adapters are modules of their own in their TransformerLayer (`layer.lora`) and add to the layer's
output from a hook: neither the names of the model's parameters nor the table of its tensors know of
them. Left out: dropout, experts, and layers with a fused norm, whose input a hook cannot see.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor

from gdpo_megatron.config.lora import LoraConfig
from gdpo_megatron.conversion.hf_io import seeded_generator
from gdpo_megatron.conversion.layouts import GatedMLP
from gdpo_megatron.conversion.mapping import Row, mapping_rows
from gdpo_megatron.conversion.peft_writer import (
    a_layout,
    b_layout,
    lora_target,
    peft_names,
)
from gdpo_megatron.distributed.mesh import Mesh

if TYPE_CHECKING:  # which imports this module
    from gdpo_megatron.policy.model import MegatronModel


class Adapter(MegatronModule):
    """What one linear layer gets added, on this rank.

    Args:
        config: of the model.
        row: of the layer's weight in the mapping.
        weight: this rank's part of it.
        lora: rank and alpha.
        mesh: the trainer's mesh.
        seed: of A; B is 0, so that the model starts as it is.
    """

    def __init__(
        self,
        config: TransformerConfig,
        row: Row,
        weight: Tensor,
        *,
        lora: LoraConfig,
        mesh: Mesh,
        seed: int,
    ):
        super().__init__(config=config)
        self.row, self.tp_group = row, mesh.tp_group
        self.scale, self.active = lora.alpha / lora.rank, True
        self._by_rows = row.layout.tp_dim == 1
        # Drawn whole and from its own name, so that it is the same in every layout; as PEFT does.
        full = torch.empty(lora.rank, row.shapes[0][1])
        generator = seeded_generator(seed, f"{row.hf[0]}/lora_A")
        torch.nn.init.kaiming_uniform_(full, a=math.sqrt(5), generator=generator)
        shard = a_layout(row).shard(full, mesh.tp_rank, mesh.tp_size)
        self.a = torch.nn.Parameter(shard.to(weight.device, weight.dtype, copy=True).contiguous())
        self.b = torch.nn.Parameter(weight.new_zeros(weight.shape[0], lora.rank))
        # What all ranks hold counts once in the gradient's norm.
        set_tensor_model_parallel_attributes(self.a, self._by_rows, 1, 1)
        set_tensor_model_parallel_attributes(self.b, not self._by_rows, 0, 1)
        on_every_rank: Any = self.b if self._by_rows else self.a
        on_every_rank.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Alpha / rank * B (A x).

        Args:
            x: [s, b, in] of a layer cut by columns, [s, b, in / tp] of one cut by rows.

        Returns:
            [s, b, out / tp], or [s, b, out] of a layer cut by rows. Under sequence parallelism the
            tensors that are not cut along their last dimension have s / tp tokens.
        """
        hidden, group = F.linear(x, self.a), self.tp_group
        match self._by_rows, self.config.sequence_parallel:
            case True, False:
                hidden = reduce_from_tensor_model_parallel_region(hidden, group=group)
            case True, True:
                hidden = reduce_scatter_to_sequence_parallel_region(hidden, group=group)
            case False, False:
                hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
            case False, True:
                hidden = gather_from_sequence_parallel_region(hidden, group=group)
        return F.linear(self.scale * hidden, self.b)

    def add_to(self, _: torch.nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        """The hook on the layer, whose output is (y, bias)."""
        if not self.active:
            return output
        y, bias = output
        return y + self(args[0]), bias

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """W + alpha / rank * B A, summed in float32, in the dtype of `weight`; a new tensor."""
        delta = self.scale * (self.b.float() @ self.a.float())
        return (weight.float() + delta).to(weight.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """As Megatron's linear layers have it, so that any layout can load it."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"a": 1} if self._by_rows else {"b": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if isinstance(self.row.layout, GatedMLP):
            # A rank has rows of both halves; Megatron saves its own fc1 by the same function.
            name = f"{prefix}b"
            state[name] = apply_swiglu_sharded_factory(state[name], sharded_offsets)
        return state


class Lora:
    """The adapters of this rank's layers. Construction freezes the model and puts them into it.

    Args:
        chunks: this rank's part of the model, with layers whose norms are modules of their own.
        rows: (row, parameter) of them.
        config: the `model.lora` section.
        mesh: the trainer's mesh.
        seed: of the adapters.
    """

    def __init__(
        self,
        chunks: Sequence[GPTModel],
        rows: Sequence[tuple[Row, torch.nn.Parameter]],
        config: LoraConfig,
        *,
        mesh: Mesh,
        seed: int,
    ):
        self.config = config
        self._adapters: dict[tuple[str, ...], Adapter] = {}
        decoders: list[Any] = [chunk.requires_grad_(False).decoder for chunk in chunks]
        layers = {layer.layer_number - 1: layer for it in decoders for layer in it.layers}
        for row, weight in rows:
            target = lora_target(row)
            if row.layer is None or target not in config.target_modules:
                continue
            layer = layers[row.layer]
            adapter = Adapter(layer.config, row, weight, lora=config, mesh=mesh, seed=seed)
            if not hasattr(layer, "lora"):
                layer.lora = MegatronModule(layer.config)
            layer.lora.add_module(target, adapter)
            linear = layer.get_submodule(row.megatron[0].removesuffix(".weight"))
            linear.register_forward_hook(adapter.add_to)
            self._adapters[row.hf] = adapter

    def adapter(self, row: Row) -> Adapter | None:
        """The adapter beside a row's parameter on this rank."""
        return self._adapters.get(row.hf)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Within, the model is the one that it started from."""
        for adapter in self._adapters.values():
            adapter.active = False
        try:
            yield
        finally:
            for adapter in self._adapters.values():
                adapter.active = True


@torch.no_grad()
def peft_tensors(model: MegatronModel) -> Iterator[tuple[str, Tensor]]:
    """All adapters under the names that PEFT gives them, whole, in layer order; on every rank.

    A of queries, keys and values is the same tensor, B is split as the weight is; so are gate and
    up projection. Collective over the trainer's mesh.
    """
    lora = model.lora
    assert lora is not None
    rank = lora.config.rank
    for row in mapping_rows(model.arch):
        if lora_target(row) not in lora.config.target_modules:
            continue
        adapter = lora.adapter(row)
        a, b = (None, None) if adapter is None else (adapter.a, adapter.b)
        (whole_a,) = model.whole_tensors(row, a_layout(row), a, [(rank, row.shapes[0][1])])
        parts = model.whole_tensors(row, b_layout(row), b, [(out, rank) for out, _ in row.shapes])
        for name, part in zip(row.hf, parts, strict=True):
            yield from zip(peft_names(name), (whole_a, part), strict=True)
