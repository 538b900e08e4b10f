"""The `advantage` section: every choice on which GDPO implementations disagree, by name."""

from __future__ import annotations

from collections.abc import Mapping

from gdpo_megatron.config.section import NonNegativeFloat, section


@section
class AdvantageConfig:
    """How rewards become advantages."""

    estimator: str = "gdpo"
    """gdpo, grpo, grpo_no_std, another registered name, or ./file.py:function."""

    weights: Mapping[str, float] | None = None
    """Reward weights by name; null means 1.0 each. In a run they come from rewards[].weight."""

    group_eps: NonNegativeFloat = 1e-6
    """Added to the std of each group."""

    batch_eps: NonNegativeFloat = 1e-6
    """Added to the std of the batch (paper eq. 6)."""
