"""What an advantage estimator is, and the table of them.

An estimator turns the rewards of a whole step, sorted into groups, into one value per rollout:

    def my_estimator(rewards: GroupedRewards, config: AdvantageConfig) -> Estimate

It is pure, works on float64 and knows neither ranks nor tokens; the batch stage (eq. 6), floor and
cap follow it. Register one with `@ESTIMATORS.register("name")`, from an installed package through
the entry point group `gdpo_megatron.advantages`, or name it `./file.py:function` in the config.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from gdpo_megatron.algorithms.groups import Groups
from gdpo_megatron.config.advantage import AdvantageConfig
from gdpo_megatron.registry import Registry


@dataclass(frozen=True, slots=True)
class GroupedRewards:
    """Rewards in canonical order, each group a contiguous run of rows.

    Args:
        names: K reward names.
        values: [B, K] float64, finite; 0 where invalid.
        valid: [B, K] bool, after the `missing` and `unscored_row` rules.
        weights: [K] float64.
        groups: the partition of the rows.
    """

    names: tuple[str, ...]
    values: Tensor
    valid: Tensor
    weights: Tensor
    groups: Groups


@dataclass(frozen=True, slots=True)
class Estimate:
    """What an estimator returns, rows as in its GroupedRewards.

    Args:
        per_reward: [B, K] float64, unweighted share of each reward; 0 where invalid.
        combined: [B] float64, before the batch stage.
        keep: [B] bool, rows that take part in the batch statistics and the loss; None means all.
        stats: named scalars for logging.
    """

    per_reward: Tensor
    combined: Tensor
    keep: Tensor | None = None
    stats: dict[str, float] = field(default_factory=dict[str, float])


class AdvantageEstimator(Protocol):
    """Signature of an estimator."""

    def __call__(self, rewards: GroupedRewards, config: AdvantageConfig) -> Estimate: ...


ESTIMATORS: Registry[AdvantageEstimator] = Registry(
    "advantage estimator", entry_point_group="gdpo_megatron.advantages"
)


def resolve_estimator(spec: str, base_dir: Path | None = None) -> AdvantageEstimator:
    """Find an estimator by registered name, or `./file.py:function` relative to `base_dir`.

    Raises:
        InputError: there is none; the message offers the nearest name.
    """
    return ESTIMATORS.get(spec, base_dir)
