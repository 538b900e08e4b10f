"""Mistral: a Llama whose first versions attend within a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gdpo_megatron.conversion.architecture import ConfigReader, ModelArchitecture
from gdpo_megatron.conversion.families.decoder import decoder_architecture
from gdpo_megatron.conversion.families.llama import LAYER_ROWS


def mistral_architecture(config: Mapping[str, Any], source: str) -> ModelArchitecture:
    """Shape of a Mistral checkpoint (transformers `MistralConfig`)."""
    read = ConfigReader(config, source)
    heads = read.integer("num_attention_heads")
    return decoder_architecture(
        read,
        "mistral",
        LAYER_ROWS,
        num_key_value_heads=read.integer("num_key_value_heads"),
        head_dim=read.integer("head_dim", read.integer("hidden_size") // heads),
        # Absent is not null: transformers then takes the first version's window.
        sliding_window=read.integer_or_null("sliding_window", 4096),
    )
