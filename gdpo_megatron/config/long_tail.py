"""The `rollout.long_tail` section: what a step does about its few longest completions."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from gdpo_megatron.config.section import NonNegativeFloat, NonNegativeInt, section

Share = Annotated[float, Field(ge=0, lt=1)]


@section
class LongTailConfig:
    """Do not wait for the longest completions of a step. All of it is off by default."""

    over_provision: NonNegativeFloat = 0.0
    """Ask for this share of groups more than num_prompts_per_step (rounded up, and then to equally
    many on each engine), train on the groups that are complete first, and stop there: short
    completions are preferred, unless max_carried_steps is set."""

    max_aborted_fraction: Share = 0.0
    """Stop when all but this share of the step's completions are finished. The others are left out
    of their groups and of the loss; with max_carried_steps their whole groups wait for the next
    step, and whole groups count."""

    max_carried_steps: NonNegativeInt = 0
    """Groups that were begun but not used go on in the next step, with the tokens that they have;
    after so many steps they are waited for, so that none is lost. 0 drops their tokens and draws
    their prompts again."""

    @model_validator(mode="after")
    def _check_carrying(self) -> LongTailConfig:
        if self.max_carried_steps and not self.is_cut:
            raise ValueError(
                f"max_carried_steps is {self.max_carried_steps}, but nothing is ever carried: set "
                "over_provision or max_aborted_fraction above 0 too"
            )
        return self

    @property
    def is_cut(self) -> bool:
        """Whether steps end before all of their completions are finished."""
        return self.over_provision > 0 or self.max_aborted_fraction > 0
