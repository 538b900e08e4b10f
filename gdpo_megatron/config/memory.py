"""The `memory` section: less memory for more computation or communication.

The recompute keys have Megatron's names and Megatron's meaning. Of its modules, those are offered
that the models here have. Not layernorm: Megatron 0.16 recomputes norms with Transformer Engine
only, whose layers have their norms inside of linear ones, where there is none to recompute.
"""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from gdpo_megatron.config.section import PositiveInt, section

RecomputeModule = Literal["core_attn", "mlp", "moe"]


@section
class MemoryConfig:
    """Memory of the update; no key changes what is computed."""

    recompute_granularity: Literal["selective", "full"] | None = None
    """Activations that are dropped in the forward pass and computed again in the backward pass:
    those of recompute_modules (selective), or of whole layers (full); null keeps all."""

    recompute_modules: tuple[RecomputeModule, ...] | None = None
    """For selective: dense MLPs (mlp), mixtures of experts (moe), attention without its projections
    (core_attn), which keeps something to give back only under context parallelism or packing."""

    recompute_method: Literal["uniform", "block"] | None = None
    """For full: every so many layers are one unit, of which only the input is kept (uniform), or
    the first so many layers of a stage are each a unit, and the others are kept (block)."""

    recompute_num_layers: PositiveInt | None = None
    """For full: those so many layers; 1 of uniform keeps the input of each layer."""

    logprob_chunk_tokens: PositiveInt | None = None
    """Tokens whose logits exist at a time, in the forward and backward pass; the backward pass then
    computes them again. null means all tokens of a micro-batch, once."""

    @model_validator(mode="after")
    def _check_recompute(self) -> MemoryConfig:
        granularity, modules = self.recompute_granularity, self.recompute_modules
        full_keys = {
            "recompute_method": self.recompute_method,
            "recompute_num_layers": self.recompute_num_layers,
        }
        for key, value in full_keys.items():
            if granularity == "full" and value is None:
                choices = "uniform or block" if key == "recompute_method" else "a number of layers"
                raise ValueError(f"recompute_granularity full needs {key}: {choices}")
            if granularity != "full" and value is not None:
                raise ValueError(f"{key} is {value}: it has a meaning for full only")
        if modules is not None and granularity != "selective":
            raise ValueError("recompute_modules have a meaning for selective only")
        if granularity == "selective" and not modules:
            raise ValueError(
                "recompute_granularity selective needs recompute_modules: core_attn, mlp or moe"
            )
        if modules is not None and len(set(modules)) < len(modules):
            raise ValueError(f"recompute_modules names a module twice: {list(modules)}")
        return self


@section
class RLMemoryConfig(MemoryConfig):
    """Memory of a step; no key changes what is computed."""

    free_grad_buffers_during_rollout: bool = False
    """Give the gradients' buffers back to the system between two updates."""

    reference: Literal["separate", "swap"] = "separate"
    """Where the reference's weights are: in a model of their own on every rank (separate), or cut
    over data-parallel ranks in host memory and exchanged with the policy's while the reference is
    asked (swap)."""
