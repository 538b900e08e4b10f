"""Which layer implementation the model is made of: Transformer Engine's where it is, else local.

The local spec is Megatron's own modules with two replacements. Norms are torch's, marked for
sequence parallelism, which Megatron's wrapper of them refuses. Attention is torch's
`scaled_dot_product_attention`, which never builds the [heads, s, s] scores that Megatron's local
attention keeps for its backward, and knows context parallelism. Rows are padded on the right, so
causality alone keeps every real token from seeing padding; no mask is needed. Rows that are packed
end to end are attended to one by one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from gdpo_megatron.platform import Platform
from gdpo_megatron.policy.context_parallel import gather_keys, token_order
from gdpo_megatron.policy.fp8_linear import Fp8Mode, fp8_layer_spec, is_fp8_layer


class RMSNorm(torch.nn.RMSNorm):
    """torch's norm with the constructor that Megatron calls."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # Under sequence parallelism a rank sees its tokens only; Megatron then sums the gradients.
        weight: Any = self.weight
        weight.sequence_parallel = config.sequence_parallel


class SDPACoreAttention(MegatronModule):
    """Causal attention for the local spec; same constructor and call as Megatron's."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["cp"])
        self.cp_group = groups.cp

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
            query: [s, b, n, d], s tokens of this context-parallel rank; [t, n, d] where packed.
            key: [s, b, g, d] or [t, g, d], with g dividing n.
            value: like key.
            attention_mask: must be None.
            attn_mask_type: causal, Megatron's for decoders.
            attention_bias: must be None.
            packed_seq_params: where packed rows begin and end; None where they are side by side.

        Returns:
            [s, b, n * d], or [t, n * d].
        """
        assert attention_mask is None and attention_bias is None
        if packed_seq_params is not None:
            ends = packed_seq_params.cu_seqlens_q
            lengths = ends.diff().tolist()
            rows = zip(*(t.unsqueeze(1).split(lengths) for t in (query, key, value)), strict=True)
            out = torch.cat([self._attend(*row, mask=None) for row in rows])
            return out.flatten(1)
        mask, d = None, query.shape[-1]
        if self.cp_group.size() > 1:
            key, value = gather_keys(torch.cat((key, value), -1), self.cp_group).split(d, -1)
            total = key.shape[0]
            order = token_order(total, self.cp_group.size()).to(query.device)
            own = order.chunk(self.cp_group.size())[self.cp_group.rank()]
            mask = own[:, None] >= torch.arange(total, device=query.device)
        return self._attend(query, key, value, mask).flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """[s, b, n, d] of queries to keys [s', b, g, d]; causal where there is no mask."""
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=key.shape[2] != query.shape[2],
        )
        return out.permute(2, 0, 1, 3)


def block_spec(
    config: TransformerConfig,
    platform: Platform,
    *,
    fused_norms: bool,
    vp_stage: int | None = None,
    fp8: Fp8Mode | None = None,
) -> TransformerBlockSubmodules | ModuleSpec:
    """The layers of a pipeline stage for this platform.

    Args:
        config: of the model.
        platform: the machine.
        fused_norms: whether a norm may be part of the linear layer that follows it, as in
            Transformer Engine's spec.
        vp_stage: which of this rank's virtual stages; None where there is one.
        fp8: of the model; the layers that multiply in FP8 are the local ones.
    """
    if fused_norms and fp8 is None and platform.has_transformer_engine():
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm
        )
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    layer: Any = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = SDPACoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    num_layers = get_num_layers_to_build(config, vp_stage)
    norm: Any = RMSNorm
    layers = [spec] * num_layers
    if fp8 is not None:
        first, in_fp8 = get_transformer_layer_offset(config, vp_stage), fp8_layer_spec(spec, fp8)
        layers = [
            in_fp8 if is_fp8_layer(fp8.config, first + i, config.num_layers) else spec
            for i in range(num_layers)
        ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)
