"""Mixtral: Mistral's attention, and experts under names of its own instead of the MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gdpo_megatron.conversion.architecture import (
    ConfigReader,
    MixtureOfExperts,
    ModelArchitecture,
)
from gdpo_megatron.conversion.families.decoder import decoder_architecture
from gdpo_megatron.conversion.tables import (
    ATTENTION_OUTPUT,
    INPUT_NORM,
    QKV_WEIGHT,
    expert_rows,
)

LAYER_ROWS = (
    INPUT_NORM,
    QKV_WEIGHT,
    ATTENTION_OUTPUT,
    *expert_rows(
        router="block_sparse_moe.gate.weight",
        gate="block_sparse_moe.experts.{expert}.w1.weight",
        up="block_sparse_moe.experts.{expert}.w3.weight",
        down="block_sparse_moe.experts.{expert}.w2.weight",
    ),
)


def mixtral_architecture(config: Mapping[str, Any], source: str) -> ModelArchitecture:
    """Shape of a Mixtral checkpoint (transformers `MixtralConfig`)."""
    read = ConfigReader(config, source)
    read.refuse("router_jitter_noise", 0.0, "noise at the router is not supported")
    heads = read.integer("num_attention_heads")
    return decoder_architecture(
        read,
        "mixtral",
        LAYER_ROWS,
        num_key_value_heads=read.integer("num_key_value_heads"),
        head_dim=read.integer("head_dim", read.integer("hidden_size") // heads),
        moe=MixtureOfExperts(
            num_experts=read.integer("num_local_experts"),
            intermediate_size=read.integer("intermediate_size"),
            top_k=read.integer("num_experts_per_tok"),
            normalize_top_k=True,
        ),
        sliding_window=read.integer_or_null("sliding_window", None),
    )
