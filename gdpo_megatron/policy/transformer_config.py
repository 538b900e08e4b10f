"""Megatron's config of a model in a layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from gdpo_megatron.config.memory import MemoryConfig
from gdpo_megatron.config.schema import ParallelConfig, PrecisionConfig
from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.conversion.pipeline import stage_layers
from gdpo_megatron.platform import Platform
from gdpo_megatron.policy.megatron_api import build_config


def transformer_config(
    arch: ModelArchitecture,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    memory: MemoryConfig,
    platform: Platform,
) -> TransformerConfig:
    """Megatron's config for an architecture in a layout."""
    dtype = getattr(torch, precision.params_dtype)
    layers = stage_layers(arch.num_layers, parallel)
    pp, vp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    layout = None
    if len(set(layers)) > 1 or parallel.pipeline_model_parallel_layout:
        stages = [["decoder"] * n for n in layers]
        stages[0].insert(0, "embedding")
        stages[-1].append("loss")
        layout = stages
    return build_config(
        TransformerConfig,
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.intermediate_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_key_value_heads,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.has_qkv_bias,
        qk_layernorm=arch.has_qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        context_parallel_size=parallel.context_parallel_size,
        pipeline_model_parallel_size=pp,
        pipeline_model_parallel_layout=layout,  # pyright: ignore[reportArgumentType]
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Micro-batches differ in rows and length: the stages tell each other the shapes. Not so
        # with virtual stages, whose micro-batches are padded to one shape.
        variable_seq_lengths=pp > 1 and vp == 1,
        virtual_pipeline_model_parallel_size=vp if vp > 1 else None,
        # With two stages both neighbours are the same rank, and messages sent as a batch are told
        # apart by their order alone, which interleaving changes: the losses are then wrong.
        overlap_p2p_comm=vp > 1,
        batch_p2p_comm=vp == 1,
        **_moe_options(arch, parallel),
        **_recompute_options(memory),
        # Losses arrive divided by the global token count; Megatron must only sum gradients.
        calculate_per_token_loss=True,
        **platform.model_overrides,
    )


def _moe_options(arch: ModelArchitecture, parallel: ParallelConfig) -> dict[str, Any]:
    # Megatron checks the dispatcher for dense models too when shapes vary.
    options: dict[str, Any] = {"moe_token_dispatcher_type": "alltoall"}
    if arch.moe is None:
        return options
    return options | {
        "num_moe_experts": arch.moe.num_experts,
        "moe_ffn_hidden_size": arch.moe.intermediate_size,
        "moe_router_topk": arch.moe.top_k,
        # A softmax over the chosen logits alone is the normalised form.
        "moe_router_pre_softmax": not arch.moe.normalize_top_k,
        # A term of pre-training; here it would pull against the rewards.
        "moe_router_load_balancing_type": "none",
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
    }


def _recompute_options(memory: MemoryConfig) -> dict[str, Any]:
    return {
        "recompute_granularity": memory.recompute_granularity,
        "recompute_method": memory.recompute_method,
        "recompute_num_layers": memory.recompute_num_layers,
        "recompute_modules": list(memory.recompute_modules) if memory.recompute_modules else None,
    }
