"""GD2PO: GDPO without the rollouts whose rewards pull in opposite directions (arXiv 2606.16771).

A rollout conflicts when some w_k A_k > 0 and some w_k A_k < 0. `hard` drops all of those, `snr` the
ones with |sum_k w_k A_k| / sum_k |w_k A_k| below a threshold. A dropped rollout leaves the batch
statistics and the loss; what remains of a group is multiplied by its kept share. The kept sums no
longer add up to 0 in a group, so eq. 6 shifts them, groups without signal included.
"""

from __future__ import annotations

import torch

from gdpo_megatron.algorithms.estimators import ESTIMATORS, Estimate, GroupedRewards
from gdpo_megatron.algorithms.gdpo import gdpo
from gdpo_megatron.config.advantage import AdvantageConfig


@ESTIMATORS.register("gd2po")
def gd2po(rewards: GroupedRewards, config: AdvantageConfig) -> Estimate:
    """GDPO's sum over the rollouts without conflict, times kept / scored of their group.

    Args:
        rewards: [B, K] in groups.
        config: the group stage's keys and the `gd2po` section.
    """
    options = config.gd2po
    estimate = gdpo(rewards, config)
    contributions = estimate.per_reward * rewards.weights
    dropped = (contributions > 0).any(1) & (contributions < 0).any(1)
    if options.mode == "snr":
        magnitude = contributions.abs().sum(1)
        dropped &= estimate.combined.abs() < options.snr_threshold * magnitude
    scored = rewards.valid.any(1)
    kept = scored & ~dropped
    combined = torch.where(kept, estimate.combined, 0.0)
    if options.scale_by_kept:
        num_kept = rewards.groups.reduce(kept.double(), "sum")
        num_scored = rewards.groups.reduce(scored.double(), "sum")
        combined = combined * rewards.groups.expand(num_kept / num_scored.clamp(min=1.0))
    stats = {"num_dropped_for_conflict": float((scored & dropped).sum())}
    return Estimate(estimate.per_reward, combined, keep=~dropped, stats=stats)
