"""The `precision.fp8` section: which matrix products run in 8 bits, and how that is watched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, field_validator

from gdpo_megatron.config.section import NonNegativeInt, PositiveFloat, PositiveInt, section

FP8_RECIPES: Mapping[str, tuple[str, ...]] = {"scaled_mm": ("tensorwise",)}
"""Recipes of each backend."""

_TRANSFORMER_ENGINE = ("te", "delayed", "blockwise", "mxfp8")


@section
class ParityCheckConfig:
    """Run a micro-batch with FP8 and without, and compare."""

    every: PositiveInt = 50
    """Steps from one check to the next; the first step is always checked."""

    max_logprob_diff: PositiveFloat = 0.5
    """Largest difference of a completion token's log-prob, in nats."""

    min_grad_cosine: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Smallest cosine between the two gradients, over all trained parameters."""

    on_failure: Literal["stop", "fall_back"] = "stop"
    """Save and stop, or go on without FP8 for the rest of the run."""


@section
class Fp8Config:
    """Multiply in FP8 in the linear layers of attention and MLP: e4m3 forward, e5m2 gradients.

    Weights, embedding, output layer, norms and everything that leaves the policy stay in
    params_dtype.
    """

    backend: Literal["scaled_mm"]
    """scaled_mm: torch's own matrix product, on GPUs from Ada and Hopper on, and on CPU, where it
    is slower than float32. Transformer Engine's FP8 is not built."""

    recipe: Literal["tensorwise"] = "tensorwise"
    """tensorwise: one scale for a tensor, from its largest value of this very pass."""

    num_first_layers_in_params_dtype: NonNegativeInt = 0
    """Layers at the start of the model that stay without FP8."""

    num_last_layers_in_params_dtype: NonNegativeInt = 0
    """Layers at its end that stay without FP8."""

    parity_check: ParityCheckConfig | None = None
    """Compare with the same pass without FP8 every so many steps; null never does."""

    @field_validator("backend", "recipe", mode="before")
    @classmethod
    def _check_built(cls, value: object) -> object:
        if value in _TRANSFORMER_ENGINE:
            choices = "; ".join(f"{b}: {', '.join(r)}" for b, r in FP8_RECIPES.items())
            raise ValueError(
                f"'{value}' is FP8 of Transformer Engine, which is not built; "
                f"backends and their recipes: {choices}"
            )
        return value
