"""Llama 2, 3, 3.1, 3.2: plain attention without biases, optional llama3 frequency scaling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gdpo_megatron.conversion.architecture import ConfigReader, ModelArchitecture
from gdpo_megatron.conversion.families.decoder import decoder_architecture
from gdpo_megatron.conversion.tables import ATTENTION_OUTPUT, GATED_MLP, INPUT_NORM, QKV_WEIGHT

LAYER_ROWS = (INPUT_NORM, QKV_WEIGHT, ATTENTION_OUTPUT, *GATED_MLP)


def llama_architecture(config: Mapping[str, Any], source: str) -> ModelArchitecture:
    """Shape of a Llama checkpoint (transformers `LlamaConfig`)."""
    read = ConfigReader(config, source)
    read.refuse("attention_bias", False, "attention biases are not supported for llama")
    read.refuse("mlp_bias", False, "MLP biases are not supported for llama")
    heads = read.integer("num_attention_heads")
    return decoder_architecture(
        read,
        "llama",
        LAYER_ROWS,
        num_key_value_heads=read.integer("num_key_value_heads", heads),
        head_dim=read.integer("head_dim", read.integer("hidden_size") // heads),
    )
