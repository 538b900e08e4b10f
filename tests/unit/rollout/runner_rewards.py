"""Rewards of the runner's tests, where the suite's workers find them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gdpo_megatron.rewards import NOT_APPLICABLE, RewardSample, register_reward


def tokens(sample: RewardSample) -> float:
    return float(sample.num_tokens)


def only_with_answer(sample: RewardSample) -> object:
    return NOT_APPLICABLE if sample.answer is None else float(sample.answer == "yes")


def raises_for_c(sample: RewardSample) -> float:
    if sample.prompt == "C":
        raise KeyError("no such thing")
    return 2.0


def marks(sample: RewardSample, path: str) -> float:
    Path(path).touch()
    return 1.0


@register_reward("runner_sees_whole_groups", batch=True)
def sees_whole_groups(samples: Sequence[RewardSample]) -> list[float]:
    return [float(len(samples))] * len(samples)
