"""Which groups each filter keeps, and that refilling always ends."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gdpo_megatron.algorithms import Refill, decide_groups
from gdpo_megatron.algorithms.dynamic_sampling import GroupDecision
from gdpo_megatron.config.advantage import AdvantageConfig
from gdpo_megatron.config.dynamic_sampling import DynamicSamplingConfig
from gdpo_megatron.errors import InputError

from .helpers import matrix

# Group: correct, format (weights 1) of two rollouts.
GROUPS = {
    1: [[1, 1], [0, 0]],  # both vary
    2: [[1, 1], [1, 1]],  # constant
    3: [[1, 0], [0, 1]],  # cancel: constant sum
    4: [[0, 1], [0, 0]],  # format alone
    5: [[1, 0], [1, 0]],  # constant, shaped
    6: [[0.1, 0.7], [0.1, 0.7]],  # constant, inexact in float32
}
KEPT = {
    "none": [1, 2, 3, 4, 5, 6],
    "advantage": [1, 4],
    "any_reward": [1, 3, 4],
    "primary_reward": [1, 3],
    "weighted_sum": [1, 4],
}


def rewards_of(groups, dtype=torch.float32):
    rows = [row for group in groups.values() for row in group]
    ids = [key for key, group in groups.items() for _ in group]
    return matrix(rows, ids, dtype=dtype)


def config_of(name):
    primary = "correct" if name == "primary_reward" else None
    return DynamicSamplingConfig(filter=name, primary_reward=primary)


@pytest.mark.parametrize("name", sorted(KEPT))
def test_each_filter_keeps_its_groups(name):
    decision = decide_groups(rewards_of(GROUPS), config_of(name), AdvantageConfig())
    assert decision.group_ids[decision.keep].tolist() == KEPT[name]
    reason = {
        "advantage": "no_advantage",
        "any_reward": "all_rewards_constant",
        "primary_reward": "primary_reward_constant",
        "weighted_sum": "weighted_sum_constant",
    }.get(name, "")
    assert [r == "kept" for r in decision.reasons] == decision.keep.tolist()
    assert {r for r in decision.reasons if r != "kept"} <= {reason}


def test_the_advantage_filter_follows_the_estimator_and_the_weights():
    """With weights 2 and 1 group 3 no longer cancels.

    Four rollouts of sum 2 cancel for GRPO but not for GDPO, and all of them conflict for GD2PO.
    """
    weighted = AdvantageConfig(weights={"correct": 2.0, "format": 1.0})
    decision = decide_groups(rewards_of(GROUPS), config_of("advantage"), weighted)
    assert decision.group_ids[decision.keep].tolist() == [1, 3, 4]
    three = matrix([[1.0, 1, 0], [1, 1, 0], [1, 0, 1], [0, 1, 1]], [0] * 4)
    for estimator, kept in (("gdpo", True), ("grpo", False), ("gd2po", False)):
        advantage = AdvantageConfig(estimator=estimator)
        assert decide_groups(three, config_of("advantage"), advantage).keep.tolist() == [kept]


def test_floor_and_cap_of_the_advantage_section_decide_nothing():
    tight = AdvantageConfig(batch_std_floor=1e9, advantage_cap=1e-9)
    decision = decide_groups(rewards_of(GROUPS), config_of("advantage"), tight)
    assert decision.group_ids[decision.keep].tolist() == KEPT["advantage"]


@pytest.mark.parametrize("name", sorted(KEPT))
def test_missing_rewards_and_rows_in_any_order(name):
    """Group 8 has no score at all, group 9 one value of each reward: nothing varies."""
    nan = math.nan
    values = [[1, 1], [nan, nan], [0, 0], [nan, nan], [1, nan], [nan, 0]]
    valid = ~torch.tensor(values).isnan()
    rewards = matrix(values, [7, 8, 7, 8, 9, 9], valid)
    decision = decide_groups(rewards, config_of(name), AdvantageConfig())
    assert decision.group_ids.tolist() == [7, 8, 9]
    assert decision.reasons[0] == "kept"
    assert decision.reasons[1] == "unscored"
    if name in ("advantage", "any_reward", "primary_reward"):
        assert not decision.keep[2]


def test_tolerance():
    rewards = matrix([0.5, 0.5001], [0, 0])
    for tolerance, kept in ((1e-6, True), (1e-3, False)):
        config = DynamicSamplingConfig(filter="any_reward", tolerance=tolerance)
        assert decide_groups(rewards, config, AdvantageConfig()).keep.tolist() == [kept]


def decision(kept: list[bool], first: int = 0) -> GroupDecision:
    ids = torch.arange(first, first + len(kept))
    reasons = tuple("kept" if k else "no_advantage" for k in kept)
    return GroupDecision(ids, torch.tensor(kept, dtype=torch.bool), reasons)


def test_refill_by_hand():
    """4 wanted; 1 of 4 kept: next round asks for 4 (3 missing at 1 in 4 needs 12, at most 4)."""
    refill = Refill(target=4, max_rounds=3)
    assert refill.num_wanted() == 4
    assert refill.add(decision([False, True, False, False])) == [1]
    assert refill.num_wanted() == 4
    assert refill.add(decision([True, True, False, True], first=10)) == [10, 11, 13]
    assert refill.num_wanted() == 0
    assert refill.metrics()["num_groups_kept"] == 4
    assert refill.metrics()["num_groups_no_advantage"] == 4
    assert refill.metrics()["num_rounds"] == 2


def test_surplus_is_counted_and_left():
    refill = Refill(target=2, max_rounds=3)
    refill.add(decision([True, False]))
    assert refill.num_wanted() == 2
    assert refill.add(decision([True, True], first=5)) == [5]
    assert refill.metrics()["num_groups_surplus"] == 1


@given(st.integers(1, 12), st.integers(1, 5), st.randoms(use_true_random=False))
def test_refill_always_ends_and_never_overfills(target, max_rounds, random):
    share = random.random() * random.randrange(2)
    refill, rounds, first = Refill(target=target, max_rounds=max_rounds), 0, 0
    taken: list[int] = []
    while wanted := refill.num_wanted():
        assert 1 <= wanted <= target
        taken += refill.add(decision([random.random() < share for _ in range(wanted)], first))
        first += wanted
        rounds += 1
        assert rounds <= max_rounds
    assert len(taken) == len(set(taken)) == refill.num_kept <= target
    assert len(taken) == target or rounds == max_rounds
    metrics = refill.metrics()
    parts = [v for k, v in metrics.items() if k not in ("num_rounds", "num_groups_sampled")]
    assert sum(parts) == metrics["num_groups_sampled"] == first


def test_bad_input():
    with pytest.raises(ValueError, match="only that filter reads it"):
        DynamicSamplingConfig(filter="primary_reward")
    with pytest.raises(ValueError, match="only that filter reads it"):
        DynamicSamplingConfig(filter="advantage", primary_reward="correct")
    with pytest.raises(ValueError, match="max_rounds"):
        DynamicSamplingConfig(max_rounds=0)
    config = DynamicSamplingConfig(filter="primary_reward", primary_reward="corect")
    with pytest.raises(InputError, match="'corect' is no reward; did you mean 'correct'"):
        decide_groups(rewards_of(GROUPS), config, AdvantageConfig())
