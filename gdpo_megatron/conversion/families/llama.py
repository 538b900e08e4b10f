"""Llama 2, 3, 3.1, 3.2: plain attention without biases, optional llama3 frequency scaling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gdpo_megatron.conversion.architecture import (
    ConfigReader,
    Llama3RopeScaling,
    ModelArchitecture,
)
from gdpo_megatron.errors import InputError


def llama_architecture(config: Mapping[str, Any], source: str) -> ModelArchitecture:
    """Shape of a Llama checkpoint (transformers `LlamaConfig`)."""
    read = ConfigReader(config, source)
    read.refuse("attention_bias", False, "attention biases are not supported for llama")
    read.refuse("mlp_bias", False, "MLP biases are not supported for llama")
    read.refuse("hidden_act", "silu", "only silu is supported for llama")
    heads = read.integer("num_attention_heads")
    groups = read.integer("num_key_value_heads", heads)
    if heads % groups:
        raise InputError(
            f"{source}: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {groups}"
        )
    theta, scaling = read.rope()
    for part in (read, ConfigReader(scaling, f"{source}: rope scaling")):
        part.refuse("partial_rotary_factor", 1.0, "llama rotates whole heads")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    rope_scaling = None
    if kind == "llama3":
        rope = ConfigReader(scaling, f"{source}: rope scaling")
        rope_scaling = Llama3RopeScaling(
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_max_position_embeddings=rope.integer("original_max_position_embeddings"),
        )
    elif kind != "default":
        raise InputError(f"{source}: rope type '{kind}' is not supported; choices: default, llama3")
    return ModelArchitecture(
        family="llama",
        num_layers=read.integer("num_hidden_layers"),
        hidden_size=read.integer("hidden_size"),
        intermediate_size=read.integer("intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=read.integer("head_dim", read.integer("hidden_size") // heads),
        vocab_size=read.integer("vocab_size"),
        max_position_embeddings=read.integer("max_position_embeddings"),
        rms_norm_eps=read.number("rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=rope_scaling,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        initializer_range=read.number("initializer_range", 0.02),
    )
