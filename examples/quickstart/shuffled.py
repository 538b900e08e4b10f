"""A control: GDPO's advantages, dealt out to the wrong rollouts.

What still rises with it is drift, not learning from rewards. It also shows an advantage estimator
of one's own: `advantage.estimator: ./shuffled.py:shuffled_gdpo`.
"""

from __future__ import annotations

import torch

from gdpo_megatron.algorithms import Estimate, GroupedRewards
from gdpo_megatron.algorithms.gdpo import gdpo
from gdpo_megatron.config.advantage import AdvantageConfig


def shuffled_gdpo(rewards: GroupedRewards, config: AdvantageConfig) -> Estimate:
    """GDPO's combined advantages in a random order over the whole batch.

    The order is drawn from the rewards themselves, so it is the same on every rank.
    """
    estimate = gdpo(rewards, config)
    rows = torch.arange(1, len(rewards.values) + 1, dtype=torch.float64)
    seed = int((rewards.values.nan_to_num().sum(1) * rows).sum().abs() * 1e3) % 2**31
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return Estimate(per_reward=estimate.per_reward, combined=estimate.combined[order])
