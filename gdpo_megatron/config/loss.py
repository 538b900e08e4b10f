"""The `loss` section: the policy objective of an update."""

from __future__ import annotations

from typing import Literal

from gdpo_megatron.config.section import NonNegativeFloat, UnitFloat, section


@section
class LossConfig:
    """Clipped surrogate with an optional KL term to the reference."""

    clip_eps_low: UnitFloat = 0.2
    """The ratio is clipped from below at 1 - clip_eps_low."""

    clip_eps_high: NonNegativeFloat = 0.28
    """The ratio is clipped from above at 1 + clip_eps_high."""

    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL to the reference in the loss; at 0 no reference is built."""

    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the per-token KL (Schulman): k1 unbiased, k2 squared, k3 positive, low variance."""
