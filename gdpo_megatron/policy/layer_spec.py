"""Which layer implementation the model is made of: Transformer Engine's where it is, else local.

The local spec is Megatron's own modules with one replacement: attention by torch's
`scaled_dot_product_attention`, which never builds the [heads, s, s] scores that Megatron's local
attention keeps for its backward. Rows are padded on the right, so causality alone keeps every
real token from seeing padding; no mask is needed.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from gdpo_megatron.platform import Platform


class SDPACoreAttention(MegatronModule):
    """Causal attention for the local spec; same constructor and call as Megatron's."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend causally.

        Args:
            query: [s, b, n, d].
            key: [s, b, g, d] with g dividing n.
            value: [s, b, g, d].
            attention_mask: must be None.
            attn_mask_type: causal, Megatron's for decoders.
            attention_bias: must be None.
            packed_seq_params: must be None.

        Returns:
            [s, b, n * d].
        """
        assert attention_mask is None and attention_bias is None and packed_seq_params is None
        s, b, n, d = query.shape
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=key.shape[2] != n,
        )
        return out.permute(2, 0, 1, 3).reshape(s, b, n * d)


def layer_spec(config: TransformerConfig, platform: Platform, *, fused_norms: bool) -> ModuleSpec:
    """The layer spec for this platform.

    Args:
        config: of the model.
        platform: the machine.
        fused_norms: whether a norm may be part of the linear layer that follows it, as in
            Transformer Engine's spec.
    """
    if fused_norms and platform.has_transformer_engine():
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm
        )
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    submodules: Any = spec.submodules
    submodules.self_attention.submodules.core_attention = SDPACoreAttention
    return spec
