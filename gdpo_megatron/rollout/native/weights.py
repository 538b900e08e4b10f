"""The model's weights as the decoder reads them: one TP rank's part, projections fused.

Filled from the stream of whole Hugging Face tensors that every engine gets, so the trainer's
layout does not matter here. Per layer (n query heads, g key/value heads of size d, all per rank):

    qkv [(n + 2g) d, h]   rows of q, then k, then v        o    [h, n d]
    gate_up [2f, h]       rows of gate, then up            down [h, f]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.conversion.mapping import hf_shapes


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Weights of one layer; see the module docstring for shapes."""

    input_norm: Tensor
    qkv: Tensor
    o: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


class NativeWeights:
    """Storage for one TP rank.

    Args:
        arch: shape of the model.
        tp_rank: this rank within its engine.
        tp_size: ranks of the engine; divides heads, key/value heads and the MLP.
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
        h, d, f = arch.hidden_size, arch.head_dim, arch.intermediate_size // tp_size
        self.num_heads = arch.num_attention_heads // tp_size
        self.num_groups = arch.num_key_value_heads // tp_size
        # Rows of the vocabulary of this rank; the last ones may be padding.
        self.vocab_rows = arch.padded_vocab_size(tp_size) // tp_size
        self.vocab_start = tp_rank * self.vocab_rows

        def empty(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.embedding = empty(self.vocab_rows, h)
        self.output = self.embedding if arch.tie_word_embeddings else empty(self.vocab_rows, h)
        self.final_norm = empty(h)
        self.layers = [
            LayerWeights(
                input_norm=empty(h),
                qkv=empty((self.num_heads + 2 * self.num_groups) * d, h),
                o=empty(h, self.num_heads * d),
                post_norm=empty(h),
                gate_up=empty(2 * f, h),
                down=empty(h, f),
            )
            for _ in range(arch.num_layers)
        ]
        self._targets = self._make_targets()

    def _make_targets(self) -> dict[str, tuple[Tensor, int | None]]:
        """Hugging Face name -> (view that it fills, dimension that TP cuts, None for none)."""
        d, f = self.arch.head_dim, self.arch.intermediate_size // self._tp_size
        targets: dict[str, tuple[Tensor, int | None]] = {
            "model.embed_tokens.weight": (self.embedding, 0),
            "model.norm.weight": (self.final_norm, None),
        }
        if not self.arch.tie_word_embeddings:
            targets["lm_head.weight"] = (self.output, 0)
        sizes = [self.num_heads * d, self.num_groups * d, self.num_groups * d]
        for index, layer in enumerate(self.layers):
            q, k, v = layer.qkv.split(sizes)
            gate, up = layer.gate_up.split(f)
            prefix = f"model.layers.{index}."
            targets |= {
                prefix + "input_layernorm.weight": (layer.input_norm, None),
                prefix + "self_attn.q_proj.weight": (q, 0),
                prefix + "self_attn.k_proj.weight": (k, 0),
                prefix + "self_attn.v_proj.weight": (v, 0),
                prefix + "self_attn.o_proj.weight": (layer.o, 1),
                prefix + "post_attention_layernorm.weight": (layer.post_norm, None),
                prefix + "mlp.gate_proj.weight": (gate, 0),
                prefix + "mlp.up_proj.weight": (up, 0),
                prefix + "mlp.down_proj.weight": (layer.down, 1),
            }
        assert targets.keys() == hf_shapes(self.arch).keys()
        return targets

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
                target.copy_(tensor)
                continue
            size = target.shape[dim]
            start = self._tp_rank * size
            # The vocabulary's last part is shorter by the padding, whose rows stay zero.
            size = max(0, min(size, tensor.shape[dim] - start))
            target.narrow(dim, 0, size).copy_(tensor.narrow(dim, start if size else 0, size))
        missing = sorted(shapes.keys() - seen)
        if missing:
            raise RuntimeError(f"weight sync: {len(missing)} tensors missing: {missing[:5]}")
