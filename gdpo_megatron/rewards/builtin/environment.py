"""What an environment gave for the turns of a completion, as one of the run's rewards.

An advantage belongs to a whole completion (as in the paper), so the turns' values become one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, Literal

from gdpo_megatron.rewards.base import RewardResult, RewardSample, invalid, register_reward

Reduce = Literal["sum", "mean", "min", "max", "last"]

_REDUCE: Final[dict[Reduce, Callable[[Sequence[float]], float]]] = {
    "sum": math.fsum,
    "mean": lambda values: math.fsum(values) / len(values),
    "min": min,
    "max": max,
    "last": lambda values: values[-1],
}


@register_reward("environment")
def environment(
    sample: RewardSample, name: str, reduce: Reduce = "sum", missing: float = 0.0
) -> RewardResult:
    """A reward that the environment gave, over the turns for which it gave it.

    Args:
        sample: with turns.
        name: of the environment's reward.
        reduce: sum, mean, min, max, or the last turn's.
        missing: the score where no turn has it.

    Returns:
        The score; invalid where the run has no environment.
    """
    if not sample.turns:
        return invalid("no environment", "set rollout.environment")
    values = [turn["rewards"][name] for turn in sample.turns if name in turn["rewards"]]
    return _REDUCE[reduce](values) if values else missing
