"""How tokens are drawn; `rollout`, `eval` and its sets all say it in these words."""

from __future__ import annotations

from gdpo_megatron.config.section import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    UnitFloat,
    section,
)


@section
class SamplingConfig:
    """How tokens are drawn."""

    temperature: NonNegativeFloat = 1.0
    """Divides the logits; 0 means greedy."""

    top_p: UnitFloat = 1.0
    """Keep the smallest set of tokens whose probability reaches this; 1 keeps all."""

    top_k: NonNegativeInt = 0
    """Keep this many tokens; 0 keeps all."""

    max_completion_tokens: PositiveInt = 256
    """A completion is cut here, with finish_reason "length"."""

    stop: tuple[str, ...] = ()
    """Strings that end a completion; they stay part of it."""

    stop_token_ids: tuple[int, ...] | None = None
    """Tokens that end a completion; null takes the end tokens of the model's generation config."""
