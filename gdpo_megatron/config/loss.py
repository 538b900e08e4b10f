"""The `loss` section: the objective of an update."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field, model_validator

from gdpo_megatron.config.section import (
    NonNegativeFloat,
    PositiveFloat,
    UnitFloat,
    section,
)

KLEstimator = Literal["k1", "k2", "k3"]
Aggregation = Literal["token_mean", "sequence_mean", "fixed_length"]


@section
class MismatchConfig:
    """Correction for an engine whose log-probs differ from the policy's on the same tokens.

    Off by default: each correction trades a small bias for another one, the engine shares the
    policy's weights, and what is left is measured in every step (mismatch_kl). Turn it on when that
    metric leaves the noise.
    """

    correction: Literal[
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "icepop"
    ] = "none"
    """How the importance weight w = pi_old / pi_rollout enters: not at all; min(w, max) per token
    or sequence; w where w <= max, else 0, per token or sequence; icepop: w per token where
    min <= w <= max, else 0."""

    max_importance_weight: PositiveFloat = 2.0
    """Upper bound of the weight."""

    min_importance_weight: NonNegativeFloat = 0.5
    """Lower bound of the weight; icepop only."""

    sequence_weight: Literal["product", "geometric_mean"] = "product"
    """Weight of a sequence: the product of its tokens' weights (unbiased, grows with length) or
    their geometric mean; for the sequence_ corrections."""

    @model_validator(mode="after")
    def _check_bounds(self) -> MismatchConfig:
        if (
            self.correction == "icepop"
            and not self.min_importance_weight < self.max_importance_weight
        ):
            raise ValueError(
                f"min_importance_weight {self.min_importance_weight} must be below "
                f"max_importance_weight {self.max_importance_weight}"
            )
        return self


@section
class LossConfig:
    """Policy objective, KL to the reference, entropy bonus and how tokens add up."""

    objective: Literal["ppo_clip", "gspo", "cispo"] = "ppo_clip"
    """ppo_clip: clipped ratio per token; gspo: clipped ratio per sequence, usually with bounds of
    about 3e-4; cispo: clipped ratio as a constant weight of log pi, so that no token loses its
    gradient."""

    clip_eps_low: UnitFloat = 0.2
    """The ratio is clipped from below at 1 - clip_eps_low."""

    clip_eps_high: NonNegativeFloat = 0.28
    """The ratio is clipped from above at 1 + clip_eps_high; above clip_eps_low is clip-higher."""

    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """With a negative advantage, the ratio counts at most this (above 1); null is off."""

    aggregation: Aggregation = "token_mean"
    """What the sum over tokens is divided by, over the whole minibatch and all ranks: its loss
    tokens; its rollouts, each a mean over its tokens; or its rollouts times
    rollout.max_completion_tokens (Dr. GRPO)."""

    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL to the reference in the loss; at 0 no reference is built."""

    kl_estimator: KLEstimator = "k3"
    """Per-token KL (Schulman): k1 unbiased, k2 squared, k3 unbiased, positive, low variance."""

    kl_gradient: Literal["direct", "unbiased"] = "direct"
    """direct differentiates the estimator as it stands (k2: the KL's gradient on policy; k3: a
    biased one; k1: none but noise); unbiased multiplies it with the ratio pi / pi_old first, which
    makes the gradient of k1 and k3 that of the KL, also off policy."""

    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""

    old_logprobs: Literal["recompute", "current", "rollout"] = "recompute"
    """What the ratio's denominator is: the policy before the update, by a forward pass; the policy
    itself, so the ratio is 1 (one minibatch per step only); or the engine's own log-probs."""

    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    """Correction for differences between engine and policy."""

    @model_validator(mode="after")
    def _check_combinations(self) -> LossConfig:
        if self.kl_gradient == "unbiased" and self.kl_estimator == "k2":
            raise ValueError(
                "kl_gradient 'unbiased' needs kl_estimator k1 or k3: times the ratio, k2 has the "
                "gradient of E[k2], which is not the KL; k2 with 'direct' is right on policy"
            )
        if self.kl_estimator == "k1" and self.kl_gradient == "direct" and self.kl_coef > 0:
            raise ValueError(
                "kl_estimator 'k1' with kl_gradient 'direct' has an expected gradient of zero; "
                "use kl_gradient: unbiased, or kl_estimator: k2 or k3"
            )
        if self.old_logprobs == "rollout" and self.mismatch.correction != "none":
            raise ValueError(
                "mismatch.correction needs old_logprobs 'recompute' or 'current': with 'rollout' "
                "the ratio itself is taken to the engine, and the weight would count twice"
            )
        if self.dual_clip is not None and self.objective != "ppo_clip":
            raise ValueError("dual_clip belongs to objective 'ppo_clip'")
        return self
