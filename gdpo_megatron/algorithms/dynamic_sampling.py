"""Dynamic sampling: keep the groups that carry a gradient, refill the batch, never without end.

The decision is a pure function of a round's rewards. The default choice for GDPO is `advantage`:
a filter on the summed reward drops groups that GDPO learns from, and "some reward varies" keeps
groups whose rewards cancel. The batch stage has no part in it, since it depends on what is kept;
the caller normalises the batch that is trained on, once it is complete.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from gdpo_megatron.algorithms.advantages import compute_advantages, resolve_weights
from gdpo_megatron.algorithms.groups import Groups, sort_into_groups
from gdpo_megatron.config.advantage import AdvantageConfig
from gdpo_megatron.config.dynamic_sampling import DynamicSamplingConfig
from gdpo_megatron.errors import InputError, did_you_mean
from gdpo_megatron.types import RewardMatrix

# Why a group is dropped, by filter.
DROP_REASONS = {
    "advantage": "no_advantage",
    "any_reward": "all_rewards_constant",
    "primary_reward": "primary_reward_constant",
    "weighted_sum": "weighted_sum_constant",
}


@dataclass(frozen=True, slots=True)
class GroupDecision:
    """What a filter says of each group.

    Args:
        group_ids: [P] int64, ascending.
        keep: [P] bool.
        reasons: P words: "kept", "unscored" (no valid reward at all), or one of DROP_REASONS.
    """

    group_ids: Tensor
    keep: Tensor
    reasons: tuple[str, ...]


def decide_groups(
    rewards: RewardMatrix,
    config: DynamicSamplingConfig,
    advantage: AdvantageConfig,
    *,
    base_dir: Path | None = None,
) -> GroupDecision:
    """Decide which groups of a round to keep.

    Args:
        rewards: [B, K] of whole groups.
        config: the `dynamic_sampling` section.
        advantage: the `advantage` section; its estimator and weights.
        base_dir: folder that an estimator `./file.py:function` is relative to.

    Raises:
        InputError: primary_reward is no reward of the batch, or as compute_advantages.
    """
    groups, order = sort_into_groups(rewards.group_ids.cpu())
    values, valid = rewards.values.detach().cpu().double(), rewards.valid.cpu()
    if config.filter == "advantage":
        # Without eq. 6, floor and cap, which do not turn a 0 into a signal.
        plain = replace(advantage, batch_norm="none", advantage_cap=None)
        signal = compute_advantages(rewards, plain, base_dir=base_dir).advantages.cpu().abs()
        signal, valid_signal = signal[:, None], torch.ones_like(valid[:, :1])
    elif config.filter == "primary_reward":
        if config.primary_reward not in rewards.names:
            raise InputError(
                f"dynamic_sampling.primary_reward '{config.primary_reward}' is no reward; "
                f"{did_you_mean(str(config.primary_reward), rewards.names)}"
            )
        column = rewards.names.index(config.primary_reward)
        signal, valid_signal = values[:, column, None], valid[:, column, None]
    elif config.filter == "weighted_sum":
        weights = resolve_weights(advantage.weights, rewards.names)
        signal = (values.masked_fill(~valid, 0.0) * weights).sum(1, keepdim=True)
        valid_signal = valid.any(1, keepdim=True)
    else:
        signal, valid_signal = values, valid
    if order is not None:
        signal, valid_signal, valid = signal[order], valid_signal[order], valid[order]

    scored = groups.reduce(valid.any(1).double(), "max") > 0
    if config.filter == "none":
        keep = torch.ones_like(scored)
    elif config.filter == "advantage":
        keep = groups.reduce(signal[:, 0], "max") > config.tolerance
    else:
        keep = (_spread(signal, valid_signal, groups) > config.tolerance).any(1)
    keep &= scored
    reason = DROP_REASONS.get(config.filter, "")
    reasons = tuple(
        "kept" if kept else (reason if has_score else "unscored")
        for kept, has_score in zip(keep.tolist(), scored.tolist(), strict=True)
    )
    return GroupDecision(groups.ids, keep, reasons)


def _spread(values: Tensor, valid: Tensor, groups: Groups) -> Tensor:
    """Max - min of the valid entries of each group, [B, K] to [P, K]; -inf where there are none."""
    high = groups.reduce(values.masked_fill(~valid, -torch.inf), "max")
    low = groups.reduce(values.masked_fill(~valid, torch.inf), "min")
    return high - low


@dataclass(slots=True)
class Refill:
    """Fills one step's batch from several rollout rounds; made anew for each step.

    while (num_groups := refill.num_wanted()): sample them, score them, then
    `refill.add(decide_groups(...))` says which to keep. It asks for at most `target` groups in each
    of at most `max_rounds` rounds, so it ends whatever the rewards are.

    Args:
        target: groups that a full batch has.
        max_rounds: rollout rounds, the first included.
    """

    target: int
    max_rounds: int
    num_rounds: int = 0
    num_sampled: int = 0
    counts: Counter[str] = field(default_factory=Counter[str])

    @property
    def num_kept(self) -> int:
        """Groups kept so far, at most `target`."""
        return self.counts["kept"]

    def num_wanted(self) -> int:
        """Groups to sample in the next round; 0 when the batch is full or the budget is spent."""
        missing = self.target - self.num_kept
        if missing <= 0 or self.num_rounds >= self.max_rounds:
            return 0
        if self.num_sampled == 0:
            return self.target
        # As many as the share kept so far says it takes, with one group as the least evidence.
        share = max(self.num_kept, 1) / self.num_sampled
        return min(self.target, math.ceil(missing / share))

    def add(self, decision: GroupDecision) -> list[int]:
        """Take a round's decision.

        Returns:
            The group ids to keep, in ascending order and never more than are missing; the rest of
            the kept ones count as "surplus".
        """
        self.num_rounds += 1
        self.num_sampled += len(decision.reasons)
        kept = decision.group_ids[decision.keep].tolist()
        taken = kept[: self.target - self.num_kept]
        self.counts.update(reason for reason in decision.reasons if reason != "kept")
        self.counts["kept"] += len(taken)
        self.counts["surplus"] += len(kept) - len(taken)
        return taken

    def metrics(self) -> dict[str, float]:
        """Counters of the step: rounds, groups sampled, kept, and dropped by reason."""
        names = ("kept", "surplus", "unscored", *DROP_REASONS.values())
        counts = {f"num_groups_{name}": float(self.counts[name]) for name in names}
        return {
            "num_rounds": float(self.num_rounds),
            "num_groups_sampled": float(self.num_sampled),
            **counts,
        }
