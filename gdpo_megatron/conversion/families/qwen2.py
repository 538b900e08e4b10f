"""Qwen2 and Qwen2.5, also what was distilled into them: biases on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gdpo_megatron.conversion.architecture import ConfigReader, ModelArchitecture
from gdpo_megatron.conversion.families.decoder import decoder_architecture, refuse_windows
from gdpo_megatron.conversion.tables import (
    ATTENTION_OUTPUT,
    GATED_MLP,
    INPUT_NORM,
    QKV_BIAS,
    QKV_WEIGHT,
)

LAYER_ROWS = (INPUT_NORM, QKV_WEIGHT, QKV_BIAS, ATTENTION_OUTPUT, *GATED_MLP)


def qwen2_architecture(config: Mapping[str, Any], source: str) -> ModelArchitecture:
    """Shape of a Qwen2 checkpoint (transformers `Qwen2Config`)."""
    read = ConfigReader(config, source)
    refuse_windows(read)
    heads = read.integer("num_attention_heads")
    return decoder_architecture(
        read,
        "qwen2",
        LAYER_ROWS,
        num_key_value_heads=read.integer("num_key_value_heads"),
        head_dim=read.integer("head_dim", read.integer("hidden_size") // heads),
    )
