"""Qwen3-MoE: Qwen3's attention, and experts instead of the MLP in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gdpo_megatron.conversion.architecture import (
    ConfigReader,
    MixtureOfExperts,
    ModelArchitecture,
)
from gdpo_megatron.conversion.families.decoder import decoder_architecture, refuse_windows
from gdpo_megatron.conversion.families.qwen3 import ATTENTION_ROWS
from gdpo_megatron.conversion.tables import expert_rows
from gdpo_megatron.errors import InputError

LAYER_ROWS = (
    *ATTENTION_ROWS,
    *expert_rows(
        router="mlp.gate.weight",
        gate="mlp.experts.{expert}.gate_proj.weight",
        up="mlp.experts.{expert}.up_proj.weight",
        down="mlp.experts.{expert}.down_proj.weight",
    ),
)


def qwen3_moe_architecture(config: Mapping[str, Any], source: str) -> ModelArchitecture:
    """Shape of a Qwen3-MoE checkpoint (transformers `Qwen3MoeConfig`)."""
    read = ConfigReader(config, source)
    read.refuse("attention_bias", False, "attention biases are not supported for qwen3_moe")
    read.refuse("decoder_sparse_step", 1, "layers without experts are not supported")
    read.refuse("mlp_only_layers", [], "layers without experts are not supported")
    refuse_windows(read)
    # Older versions of transformers write num_experts, version 5 num_local_experts.
    names = ("num_local_experts", "num_experts")
    found = {name: read.integer(name) for name in names if config.get(name) is not None}
    if len(set(found.values())) != 1:
        raise InputError(f"{source}: needs '{names[0]}' or '{names[1]}', got {found or 'neither'}")
    heads = read.integer("num_attention_heads")
    return decoder_architecture(
        read,
        "qwen3_moe",
        LAYER_ROWS,
        num_key_value_heads=read.integer("num_key_value_heads"),
        head_dim=read.integer("head_dim", read.integer("hidden_size") // heads),
        moe=MixtureOfExperts(
            num_experts=next(iter(found.values())),
            intermediate_size=read.integer("moe_intermediate_size"),
            top_k=read.integer("num_experts_per_tok"),
            normalize_top_k=read.flag("norm_topk_prob", False),
        ),
    )
