"""The `dynamic_sampling` section: which groups are worth training on, and how long to look."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from gdpo_megatron.config.section import NonNegativeFloat, PositiveInt, section


@section
class DynamicSamplingConfig:
    """Keep the groups that the estimator can learn from and draw others for the rest."""

    filter: Literal["none", "advantage", "any_reward", "primary_reward", "weighted_sum"] = "none"
    """A group is kept when: always; some |advantage| of the estimator in use is above the
    tolerance; some reward varies; primary_reward varies; the weighted sum varies (the paper's
    setting, which drops groups that GDPO could use)."""

    primary_reward: str | None = None
    """The reward that filter primary_reward looks at."""

    tolerance: NonNegativeFloat = 1e-6
    """Spread (max - min), or |advantage|, above which a group counts as varying."""

    max_rounds: PositiveInt = 4
    """Rollout rounds of a step, the first included; then the step trains on what it has."""

    @model_validator(mode="after")
    def _check_primary(self) -> DynamicSamplingConfig:
        if (self.filter == "primary_reward") != (self.primary_reward is not None):
            raise ValueError(
                f"filter is '{self.filter}' and primary_reward {self.primary_reward!r}; "
                "filter primary_reward needs a reward's name, and only that filter reads it"
            )
        return self
