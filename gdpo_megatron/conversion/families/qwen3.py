"""Qwen3: each query and key head is normalised before it is rotated; no biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gdpo_megatron.conversion.architecture import ConfigReader, ModelArchitecture
from gdpo_megatron.conversion.families.decoder import decoder_architecture, refuse_windows
from gdpo_megatron.conversion.tables import (
    ATTENTION_OUTPUT,
    GATED_MLP,
    INPUT_NORM,
    KEY_NORM,
    QKV_WEIGHT,
    QUERY_NORM,
)

ATTENTION_ROWS = (INPUT_NORM, QKV_WEIGHT, QUERY_NORM, KEY_NORM, ATTENTION_OUTPUT)
LAYER_ROWS = (*ATTENTION_ROWS, *GATED_MLP)


def qwen3_architecture(config: Mapping[str, Any], source: str) -> ModelArchitecture:
    """Shape of a Qwen3 checkpoint (transformers `Qwen3Config`)."""
    read = ConfigReader(config, source)
    read.refuse("attention_bias", False, "attention biases are not supported for qwen3")
    refuse_windows(read)
    return decoder_architecture(
        read,
        "qwen3",
        LAYER_ROWS,
        num_key_value_heads=read.integer("num_key_value_heads"),
        head_dim=read.integer("head_dim"),
    )
