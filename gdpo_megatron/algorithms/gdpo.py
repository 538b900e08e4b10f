"""GDPO: normalise each reward in its group, then add them up (arXiv 2601.05242, eq. 4 and 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from gdpo_megatron.algorithms.estimators import ESTIMATORS, Estimate, GroupedRewards
from gdpo_megatron.algorithms.group_normalize import group_scale, group_statistics
from gdpo_megatron.algorithms.groups import ROUNDING, without_rounding
from gdpo_megatron.config.advantage import AdvantageConfig


@ESTIMATORS.register("gdpo")
def gdpo(rewards: GroupedRewards, config: AdvantageConfig) -> Estimate:
    """A_k = (r_k - mean_G r_k) / (std_G r_k + eps); combined = sum_k w_k A_k.

    Args:
        rewards: [B, K] in groups.
        config: the group stage's keys.
    """
    statistics = group_statistics(
        rewards.values, rewards.valid, rewards.groups, config, rewards.names
    )
    per_reward = group_scale(statistics, rewards.groups, config)
    per_reward *= statistics.deviation
    return Estimate(per_reward, weighted_sum(per_reward, rewards.weights))


def weighted_sum(per_reward: Tensor, weights: Tensor) -> Tensor:
    """sum_k w_k A_k, [B, K] and [K] to [B]; rewards that cancel give 0, not rounding."""
    # Not a matrix product: BLAS adds up in another order near the ends of the batch.
    combined = (per_reward * weights).sum(1)
    if per_reward.numel() == 0:
        return combined
    # The exact test is a pass over [B, K]; only rows near zero need it.
    low, high = per_reward.aminmax()
    bound = float(torch.maximum(-low, high)) * float(weights.abs().sum())
    rows = ((combined != 0) & (combined.abs() <= ROUNDING * bound)).nonzero()[:, 0]
    magnitude = (per_reward[rows] * weights).abs().sum(1)
    combined[rows] = without_rounding(combined[rows], magnitude)
    return combined
