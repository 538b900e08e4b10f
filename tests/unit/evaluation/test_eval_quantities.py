"""pass@k, avg@n and shares against hand-computed cases; standard errors and intervals.

Not covered: that intervals cover what they should on real sets (small sets, skewed accuracies).
"""

from __future__ import annotations

import math
import random
from itertools import combinations

import pytest

from gdpo_megatron.config.evaluation import CorrectConfig
from gdpo_megatron.evaluation.quantities import (
    ScoredSample,
    estimate,
    pass_at_k,
    per_prompt_values,
)
from gdpo_megatron.types import FinishReason


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (1, 0, 1, 0.0),
        (1, 1, 1, 1.0),
        (5, 2, 1, 2 / 5),
        (5, 2, 2, 1 - 3 / 10),  # 1 - C(3, 2) / C(5, 2)
        (5, 2, 3, 1 - 1 / 10),  # 1 - C(3, 3) / C(5, 3)
        (5, 2, 4, 1.0),  # n - c < k: a wrong draw of 4 does not exist
        (5, 0, 5, 0.0),
        (10, 3, 5, 1 - 21 / 252),  # 1 - C(7, 5) / C(10, 5)
        (16, 1, 8, 0.5),
        (16, 8, 16, 1.0),
        (200, 1, 100, 0.5),
        (100_000, 1, 1, 1e-5),  # where factorials would not do
    ],
)
def test_pass_at_k_by_hand(n: int, c: int, k: int, expected: float):
    assert pass_at_k(n, c, k) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_pass_at_k_is_the_share_of_the_draws_that_hold_a_right_one():
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(combinations([True] * c + [False] * (n - c), k))
                share = sum(map(any, draws)) / len(draws)
                assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(2, 3, 1), (2, -1, 1), (2, 1, 3), (2, 1, 0)])
def test_pass_at_k_refuses_what_is_not_defined(n: int, c: int, k: int):
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(n, c, k)


def sample(num_tokens: int, finish: FinishReason = "stop", **rewards: float | None) -> ScoredSample:
    return ScoredSample(num_tokens=num_tokens, finish_reason=finish, rewards=rewards)


# Two prompts of four: 1 and 3 right, of the second one with a sample that has no score.
PROMPTS = [
    [
        sample(10, right=1.0, bug_free=1.0, format=1.0),
        sample(4000, right=0.5, bug_free=0.0, format=0.0),
        sample(4001, "length", right=0.0, bug_free=0.0, format=0.0),
        sample(20, right=0.0, bug_free=1.0, format=1.0),
    ],
    [
        sample(30, right=1.0, bug_free=1.0, format=1.0),
        sample(30, right=1.0, bug_free=1.0, format=1.0),
        sample(30, right=1.0, bug_free=1.0, format=0.0),
        sample(5000, "length", right=None, bug_free=None, format=1.0),
    ],
]


def values(correct: CorrectConfig | None, exceed: int | None = 4000) -> dict:
    return per_prompt_values(
        PROMPTS,
        rewards=("right", "bug_free", "format"),
        correct=correct,
        exceed_tokens=exceed,
        format_reward="format",
        bug_reward="bug_free",
    )


def test_every_quantity_by_hand():
    found = values(CorrectConfig(reward="right", pass_at_k=(1, 2, 4)))
    assert found == {
        "pass@1": [0.25, 1.0],
        "pass@2": [0.5, 1.0],
        "pass@4": [1.0, None],  # three scores are not enough to say
        "reward/right": [0.375, 1.0],
        "reward/bug_free": [0.5, 1.0],
        "reward/format": [0.5, 0.75],
        "format_share": [0.5, 0.75],
        "bug_share": [0.5, 0.0],
        "exceed_share": [0.25, 0.25],  # 4000 tokens do not exceed 4000
        "truncated_share": [0.25, 0.25],
        "mean_tokens": [(10 + 4000 + 4001 + 20) / 4, (90 + 5000) / 4],
    }


def test_right_is_at_least_the_bound():
    found = values(CorrectConfig(reward="right", gte=0.5))
    assert found["pass@1"] == [0.5, 1.0]


def test_what_is_not_asked_for_or_not_scored_is_not_reported():
    found = values(CorrectConfig(reward="elsewhere"), exceed=None)
    assert not [name for name in found if name.startswith(("pass@", "exceed"))]
    assert "pass@1" not in values(None)


def test_estimate_by_hand():
    """Of 0, 1, 1, 1: mean 3/4, std 1/2, standard error 1/4; what has no value does not count."""
    found = estimate([0.0, None, 1.0, 1.0, 1.0], num_bootstrap=4000, seed=1)
    assert (found.mean, found.standard_error, found.num_prompts) == (0.75, 0.25, 4)
    # The mean of four resampled prompts is Binomial(4, 3/4) / 4: below 1/4 in 0.4 % (1/4^4), at
    # most 1/4 in 5.1 %, so the 2.5 % percentile is 1/4; all of them are 1 in 31.6 %.
    assert found.interval == (0.25, 1.0)


def test_interval_is_about_two_standard_errors_of_many_prompts():
    rng = random.Random(3)
    data = [rng.gauss(5.0, 2.0) for _ in range(400)]
    found = estimate(data, num_bootstrap=4000, seed=1)
    assert found.mean is not None and found.standard_error is not None and found.interval
    assert found.standard_error == pytest.approx(2.0 / 20, rel=0.1)
    low, high = found.interval
    assert (high - low) / (2 * 1.96 * found.standard_error) == pytest.approx(1.0, abs=0.05)
    assert estimate(data, num_bootstrap=4000, seed=1) == found
    assert estimate(data, num_bootstrap=4000, seed=2).interval != found.interval


def test_the_bootstrap_does_not_depend_on_its_blocks(monkeypatch: pytest.MonkeyPatch):
    data = [float(n % 3) for n in range(50)]
    whole = estimate(data, num_bootstrap=300, seed=4)
    monkeypatch.setattr("gdpo_megatron.evaluation.quantities._BLOCK", 170)
    assert estimate(data, num_bootstrap=300, seed=4) == whole


def test_what_cannot_be_said_is_none():
    nothing = estimate([None, None], num_bootstrap=10, seed=0)
    assert (nothing.mean, nothing.standard_error, nothing.interval) == (None, None, None)
    one = estimate([0.5], num_bootstrap=10, seed=0)
    assert (one.mean, one.standard_error, one.interval) == (0.5, None, None)
    assert not math.isnan(one.mean or 0.0)
