"""What the configs of all families here have in common: sizes, rotary positions, refusals."""

from __future__ import annotations

from typing import Any

from gdpo_megatron.conversion.architecture import (
    ConfigReader,
    Llama3RopeScaling,
    MixtureOfExperts,
    ModelArchitecture,
)
from gdpo_megatron.conversion.tables import LayerRow
from gdpo_megatron.errors import InputError


def decoder_architecture(
    read: ConfigReader,
    family: str,
    layer_rows: tuple[LayerRow, ...],
    *,
    num_key_value_heads: int,
    head_dim: int,
    moe: MixtureOfExperts | None = None,
    sliding_window: int | None = None,
) -> ModelArchitecture:
    """The architecture that a config describes, but for what families read in their own way.

    Args:
        read: the config.
        family: name in messages.
        layer_rows: the family's table.
        num_key_value_heads: g.
        head_dim: d.
        moe: experts, if there are any.
        sliding_window: longest distance of attention, if there is one.

    Raises:
        InputError: a key is missing or wrong, or asks for what is not built.
    """
    read.refuse("hidden_act", "silu", f"only silu is supported for {family}")
    heads = read.integer("num_attention_heads")
    if heads % num_key_value_heads:
        raise InputError(
            f"{read.source}: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {num_key_value_heads}"
        )
    theta, scaling = _rope(read, family)
    return ModelArchitecture(
        family=family,
        num_layers=read.integer("num_hidden_layers"),
        hidden_size=read.integer("hidden_size"),
        intermediate_size=read.integer("intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        vocab_size=read.integer("vocab_size"),
        max_position_embeddings=read.integer("max_position_embeddings"),
        rms_norm_eps=read.number("rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=read.flag("tie_word_embeddings", False),
        initializer_range=read.number("initializer_range", 0.02),
        layer_rows=layer_rows,
        moe=moe,
        sliding_window=sliding_window,
    )


def _rope(read: ConfigReader, family: str) -> tuple[float, Llama3RopeScaling | None]:
    theta, values = read.rope()
    rope = ConfigReader(values, f"{read.source}: rope scaling")
    for part in (read, rope):
        part.refuse("partial_rotary_factor", 1.0, f"{family} rotates whole heads")
    kind = values.get("rope_type", values.get("type", "default"))
    scaling: dict[str, Any] = {"default": None, "llama3": rope}
    if kind not in scaling:
        raise InputError(
            f"{read.source}: rope type '{kind}' is not supported; choices: {', '.join(scaling)}"
        )
    if kind == "default":
        return theta, None
    return theta, Llama3RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings"),
    )


def refuse_windows(read: ConfigReader) -> None:
    """Refuse Qwen's sliding windows; the size alone, without the switch, has no effect."""
    read.refuse("use_sliding_window", False, "sliding windows are not supported")
    for kind in read.config.get("layer_types") or ():
        if kind != "full_attention":
            raise InputError(
                f"{read.source}: 'layer_types' holds '{kind}'; only full_attention is supported"
            )
