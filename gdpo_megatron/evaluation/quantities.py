"""What is measured of an evaluation set: one number per prompt, then a mean over prompts.

Every quantity is of this form, so all of them have a standard error and an interval of the same
kind: prompts are the independent draws, the samples of a prompt are not. Prompts count alike, also
where some of their samples have no score. Definitions: docs/evaluation.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gdpo_megatron.config.evaluation import CorrectConfig
from gdpo_megatron.types import FinishReason

INTERVAL = 0.95
"""What intervals are meant to cover."""

_BLOCK = 2**22
"""Draws of the bootstrap that are held at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredSample:
    """What quantities are made of.

    Args:
        num_tokens: of the completion, stop token included.
        finish_reason: why it ended.
        rewards: value by name; None where there is none.
    """

    num_tokens: int
    finish_reason: FinishReason
    rewards: Mapping[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over prompts; what cannot be said is None.

    Args:
        mean: None where no prompt has a value.
        standard_error: std (n - 1) over prompts / sqrt(prompts); None for fewer than two.
        interval: percentiles of the mean over resampled prompts; None for fewer than two.
        num_prompts: that have a value.
    """

    mean: float | None
    standard_error: float | None
    interval: tuple[float, float] | None
    num_prompts: int


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Chance that one of k samples is right, unbiased: 1 - C(n - c, k) / C(n, k).

    As the product over i = n - c + 1 .. n of (1 - k / i), for the binomials are huge (Chen et al.,
    arXiv 2107.03374).

    Args:
        num_samples: n of a prompt, at least k.
        num_right: c of them are right.
        k: how many samples.

    Raises:
        ValueError: not 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= num_right <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_right} right among {num_samples} is not defined")
    if num_samples - num_right < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(num_samples - num_right + 1, num_samples + 1))


def estimate(per_prompt: Iterable[float | None], *, num_bootstrap: int, seed: int) -> Estimate:
    """Mean, standard error and interval of a quantity.

    Args:
        per_prompt: its value for each prompt; None is left out.
        num_bootstrap: resamples of the prompts.
        seed: of the resampling; equal inputs give equal bits.
    """
    values = np.array([value for value in per_prompt if value is not None], dtype=np.float64)
    size = len(values)
    if not size:
        return Estimate(mean=None, standard_error=None, interval=None, num_prompts=0)
    mean = float(values.mean())
    if size == 1:
        return Estimate(mean=mean, standard_error=None, interval=None, num_prompts=1)
    rng = np.random.default_rng(seed)
    means = np.empty(num_bootstrap)
    block = max(1, _BLOCK // size)
    for first in range(0, num_bootstrap, block):
        count = min(block, num_bootstrap - first)
        means[first : first + count] = values[rng.integers(size, size=(count, size))].mean(1)
    outside = (1 - INTERVAL) / 2
    low, high = np.quantile(means, (outside, 1 - outside)).tolist()
    error = float(values.std(ddof=1)) / math.sqrt(size)
    return Estimate(mean=mean, standard_error=error, interval=(low, high), num_prompts=size)


def per_prompt_values(
    prompts: Sequence[Sequence[ScoredSample]],
    *,
    rewards: Sequence[str],
    correct: CorrectConfig | None,
    exceed_tokens: int | None,
    format_reward: str | None,
    bug_reward: str | None,
) -> dict[str, list[float | None]]:
    """Every quantity of a set, by name, for each prompt; None where a prompt has no value.

    Args:
        prompts: the samples of each prompt.
        rewards: names of the set's rewards; each gives `reward/<name>`, its mean.
        correct: gives `pass@<k>`; left out where its reward is not among the set's.
        exceed_tokens: gives `exceed_share`, of samples longer than this.
        format_reward: gives `format_share`, of samples where it is at least 1.
        bug_reward: gives `bug_share`, of samples where it is below 1.
    """

    def mean_of(measure: Callable[[ScoredSample], float | None]) -> list[float | None]:
        return [_mean(measure(sample) for sample in samples) for samples in prompts]

    def share_of(name: str, holds: Callable[[float], bool]) -> list[float | None]:
        def measure(sample: ScoredSample) -> float | None:
            value = sample.rewards.get(name)
            return None if value is None else float(holds(value))

        return mean_of(measure)

    found: dict[str, list[float | None]] = {}
    if correct is not None and correct.reward in rewards:
        for k in correct.pass_at_k:
            found[f"pass@{k}"] = [_pass_at_k(samples, correct, k) for samples in prompts]
    for name in rewards:
        found[f"reward/{name}"] = mean_of(lambda sample, name=name: sample.rewards.get(name))
    if format_reward in rewards:
        found["format_share"] = share_of(str(format_reward), lambda value: value >= 1)
    if bug_reward in rewards:
        found["bug_share"] = share_of(str(bug_reward), lambda value: value < 1)
    if exceed_tokens is not None:
        found["exceed_share"] = mean_of(lambda it: float(it.num_tokens > exceed_tokens))
    found["truncated_share"] = mean_of(lambda it: float(it.finish_reason == "length"))
    found["mean_tokens"] = mean_of(lambda it: float(it.num_tokens))
    return found


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there) if there else None


def _pass_at_k(samples: Sequence[ScoredSample], correct: CorrectConfig, k: int) -> float | None:
    """Of one prompt, over its samples that have a score; None where these are fewer than k."""
    values = [sample.rewards.get(correct.reward) for sample in samples]
    right = [value >= correct.gte for value in values if value is not None]
    return pass_at_k(len(right), sum(right), k) if len(right) >= k else None
