"""GRPO: add the rewards up, then normalise the sum in its group (arXiv 2402.03300; eq. 1 and 2).

With a missing reward the sum takes that reward's group mean in its place, so that it neither helps
nor hurts, as in GDPO; without missing ones this is the plain formula. `per_reward` is each reward's
share, (r_k - mean_G r_k) / std_G R, so that its weighted sum is the advantage for every estimator.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gdpo_megatron.algorithms.estimators import ESTIMATORS, Estimate, GroupedRewards
from gdpo_megatron.algorithms.gdpo import weighted_sum
from gdpo_megatron.algorithms.group_normalize import (
    GroupStatistics,
    group_scale,
    group_statistics,
    leave_one_out_factor,
)
from gdpo_megatron.config.advantage import AdvantageConfig


@ESTIMATORS.register("grpo")
def grpo(rewards: GroupedRewards, config: AdvantageConfig) -> Estimate:
    """(R - mean_G R) / (std_G R + eps) of R = sum_k w_k r_k.

    Args:
        rewards: [B, K] in groups.
        config: the group stage's keys, applied to R.
    """
    shares, statistics = _shares_of_sum(rewards, config)
    per_reward = shares * group_scale(statistics, rewards.groups, config)
    return Estimate(per_reward, weighted_sum(per_reward, rewards.weights))


@ESTIMATORS.register("grpo_no_std")
def grpo_no_std(rewards: GroupedRewards, config: AdvantageConfig) -> Estimate:
    """R - mean_G R, as in Dr. GRPO (arXiv 2503.20783).

    Args:
        rewards: [B, K] in groups.
        config: baseline, constant_test, constant_atol, small_group, group_ddof.
    """
    shares, _ = _shares_of_sum(rewards, config)
    return Estimate(shares, weighted_sum(shares, rewards.weights))


def _shares_of_sum(
    rewards: GroupedRewards, config: AdvantageConfig
) -> tuple[Tensor, GroupStatistics]:
    """Each reward's part of R minus its baseline [B, K], and the statistics of R [B, 1]."""
    groups = rewards.groups
    to_mean = replace(
        config,
        baseline="mean",
        small_group="zero",
        constant_atol=0.0,
        group_ddof=0,
    )
    shares = group_statistics(
        rewards.values, rewards.valid, groups, to_mean, rewards.names
    ).deviation
    # R minus its mean is the sum of what each reward deviates from its own.
    summed = weighted_sum(shares, rewards.weights)[:, None]
    scored = rewards.valid.any(1, keepdim=True)
    statistics = group_statistics(summed, scored, groups, config, ("the weighted sum",))
    if config.baseline == "leave_one_out":
        shares = shares * groups.expand(leave_one_out_factor(statistics.count))
    shares = torch.where(groups.expand(statistics.live), shares, 0.0)
    if config.small_group == "raw":
        shares = torch.where(groups.expand(statistics.single), rewards.values, shares)
    return shares, statistics
