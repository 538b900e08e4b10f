"""The model's weights as the decoder reads them: one TP rank's part, projections fused.

Filled from the stream of whole Hugging Face tensors that every engine gets, so the trainer's
layout does not matter here. Which tensor fills which part is the mapping table's word: its rows
name the Megatron parameter, `_parts` says where that parameter's tensors go. Per layer (n query
heads, g key/value heads of size d, f MLP columns, all per rank; E experts):

    qkv [(n + 2g) d, h]   rows of q, then k, then v        o    [h, n d]
    gate_up [2f, h]       rows of gate, then up            down [h, f]
    with experts: router [E, h], gate_up [E, 2f, h], down [E, h, f]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.conversion.mapping import Row, hf_shapes, mapping_rows


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Weights of one layer; see the module docstring for shapes."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    """[(n + 2g) d]."""
    qk_norm: Tensor | None
    """[n + g, d]: a query head's weights for each query head, then a key head's."""
    o: Tensor
    post_norm: Tensor
    router: Tensor | None
    gate_up: Tensor
    down: Tensor


class NativeWeights:
    """Storage for one TP rank.

    Args:
        arch: shape of the model.
        tp_rank: this rank within its engine.
        tp_size: ranks of the engine; divides heads, key/value heads and the MLP (or each expert).
        dtype: of the weights.
        device: where they live.
    """

    def __init__(
        self,
        arch: ModelArchitecture,
        tp_rank: int,
        tp_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.arch, self._tp_rank, self._tp_size = arch, tp_rank, tp_size
        h, d = arch.hidden_size, arch.head_dim
        self.num_heads = arch.num_attention_heads // tp_size
        self.num_groups = arch.num_key_value_heads // tp_size
        # Rows of the vocabulary of this rank; the last ones may be padding.
        self.vocab_rows = arch.padded_vocab_size(tp_size) // tp_size
        self.vocab_start = tp_rank * self.vocab_rows
        self._mlp_columns = f = arch.mlp_columns // tp_size

        def empty(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        experts = (arch.moe.num_experts,) if arch.moe else ()
        qkv_rows = (self.num_heads + 2 * self.num_groups) * d
        self.embedding = empty(self.vocab_rows, h)
        self.output = self.embedding if arch.tie_word_embeddings else empty(self.vocab_rows, h)
        self.final_norm = empty(h)
        self.layers = [
            LayerWeights(
                input_norm=empty(h),
                qkv=empty(qkv_rows, h),
                qkv_bias=empty(qkv_rows) if arch.has_qkv_bias else None,
                qk_norm=empty(self.num_heads + self.num_groups, d) if arch.has_qk_norm else None,
                o=empty(h, self.num_heads * d),
                post_norm=empty(h),
                router=empty(*experts, h) if arch.moe else None,
                gate_up=empty(*experts, 2 * f, h),
                down=empty(*experts, h, f),
            )
            for _ in range(arch.num_layers)
        ]
        self._targets = {
            name: (view, row.layout.tp_dim)
            for row in mapping_rows(arch)
            if not row.import_only
            for name, view in zip(row.hf, self._parts(row), strict=True)
        }

    def _parts(self, row: Row) -> list[Tensor]:
        """The views that the Hugging Face tensors of a row fill, in the row's order."""
        name = row.megatron[0]
        if row.layer is None:
            whole = {
                "embedding.word_embeddings.weight": self.embedding,
                "decoder.final_layernorm.weight": self.final_norm,
                "output_layer.weight": self.output,
            }
            return [whole[name]]
        layer = self.layers[row.layer]
        d, heads, groups = self.arch.head_dim, self.num_heads, self.num_groups
        if row.expert is not None:
            gate_up, down = layer.gate_up[row.expert], layer.down[row.expert]
        else:
            gate_up, down = layer.gate_up, layer.down
        of_heads = [heads * d, groups * d, groups * d]
        parts = {
            "input_layernorm.weight": [layer.input_norm],
            "self_attention.linear_qkv.weight": layer.qkv.split(of_heads),
            "self_attention.linear_proj.weight": [layer.o],
            "pre_mlp_layernorm.weight": [layer.post_norm],
            "mlp.linear_fc1.weight": gate_up.split(self._mlp_columns),
            "mlp.linear_fc2.weight": [down],
            "mlp.experts.local_experts.{expert}.linear_fc1.weight": gate_up.split(
                self._mlp_columns
            ),
            "mlp.experts.local_experts.{expert}.linear_fc2.weight": [down],
        }
        if layer.qkv_bias is not None:
            parts["self_attention.linear_qkv.bias"] = layer.qkv_bias.split(of_heads)
        if layer.qk_norm is not None:
            parts["self_attention.q_layernorm.weight"] = [layer.qk_norm[:heads]]
            parts["self_attention.k_layernorm.weight"] = [layer.qk_norm[heads:]]
        if layer.router is not None:
            parts["mlp.router.weight"] = [layer.router]
        return list(parts[name])

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy this rank's part of every tensor.

        Raises:
            RuntimeError: a tensor is unknown, comes twice, is missing or has the wrong shape.
        """
        shapes, seen = hf_shapes(self.arch), set[str]()
        for name, tensor in tensors:
            if name not in self._targets or name in seen or tuple(tensor.shape) != shapes[name]:
                raise RuntimeError(
                    f"weight sync: unexpected tensor '{name}' {list(tensor.shape)}"
                    f"{' (a second time)' if name in seen else ''}; "
                    f"expected shape {shapes.get(name)}"
                )
            seen.add(name)
            target, dim = self._targets[name]
            if dim is None:
                target.copy_(tensor)  # a head's norm to every head
                continue
            size = target.shape[dim]
            start = self._tp_rank * size
            # The vocabulary's last part is shorter by the padding, whose rows stay zero.
            size = max(0, min(size, tensor.shape[dim] - start))
            target.narrow(dim, 0, size).copy_(tensor.narrow(dim, start if size else 0, size))
        missing = sorted(shapes.keys() - seen)
        if missing:
            raise RuntimeError(f"weight sync: {len(missing)} tensors missing: {missing[:5]}")

    @torch.no_grad()
    def whole_tensors(self, group: ProcessGroup | None) -> Iterator[tuple[str, Tensor]]:
        """What `load` was given, put together again; collective over `group`, the engine's ranks.

        Of a norm that every head has a copy of, it is the first copy that differs from head 0's.
        """
        for name, shape in hf_shapes(self.arch).items():
            view, dim = self._targets[name]
            if dim is None:
                if view.ndim > len(shape):
                    view = view[int((view != view[0]).any(1).int().argmax())]
                yield name, view
                continue
            if group is not None:
                parts = [torch.empty_like(view) for _ in range(group.size())]
                dist.all_gather(parts, view.contiguous(), group=group)
                view = torch.cat(parts, dim)
            yield name, view.narrow(dim, 0, shape[dim])  # without the vocabulary's padding
