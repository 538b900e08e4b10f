"""What the suite hands to the trainer: the rewards of many rollouts as tensors, faults accounted.

Conditions (`when:`) are applied here, before anything is normalised: a gated reward keeps its value
where the reward it depends on is, raw, at least `gte`; below that it is 0.0 (paper eq. 8). Where
one of the two is missing, the gated one is missing too. Weights are not applied here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gdpo_megatron.config.reward import GateConfig
from gdpo_megatron.rewards.base import (
    NOT_APPLICABLE,
    Invalid,
    NotApplicable,
    RewardResult,
)
from gdpo_megatron.rewards.report import RewardReport
from gdpo_megatron.rewards.resolve import ResolvedReward
from gdpo_megatron.types import RewardMatrix


@dataclass(frozen=True, slots=True)
class RewardScores:
    """Rewards of n rollouts, rows in order of sample_id, columns in order of the config.

    Args:
        names: K reward names.
        sample_ids: [n] int64, ascending.
        raw: [n, K] float64 as the functions returned them; NaN where there is no score.
        values: [n, K] float64 with conditions applied; NaN where not `valid`.
        valid: [n, K] bool, there is a value.
        not_applicable: [n, K] bool, the reward says nothing about this row; never also `valid`.
        reasons: (sample_id, reward name) -> why an entry is not valid; one for each such entry.
        num_invalid: reward name -> reason -> rows; not_applicable is not among them.
        num_not_applicable: reward name -> rows.
        tracebacks: reward name -> that of the first row, by sample_id, that raised.
        report: these faults, and what else happened while the rewards ran.
    """

    names: tuple[str, ...]
    sample_ids: Tensor
    raw: Tensor
    values: Tensor
    valid: Tensor
    not_applicable: Tensor
    reasons: Mapping[tuple[int, str], str]
    num_invalid: Mapping[str, Mapping[str, int]]
    num_not_applicable: Mapping[str, int]
    tracebacks: Mapping[str, str]
    report: RewardReport

    def to_matrix(self, group_ids: Tensor) -> RewardMatrix:
        """The matrix that the advantage stage takes.

        Args:
            group_ids: [n] int64, the group of each row.
        """
        sample_ids: list[int] = self.sample_ids.tolist()
        rows = {sample_id: row for row, sample_id in enumerate(sample_ids)}
        reasons = {(rows[sample], name): why for (sample, name), why in self.reasons.items()}
        return RewardMatrix(self.names, self.values, self.valid, group_ids, reasons)


def build_scores(
    rewards: Sequence[ResolvedReward],
    results: Mapping[int, Sequence[RewardResult]],
    report: RewardReport | None = None,
) -> RewardScores:
    """Apply the conditions and account for what is missing.

    Args:
        rewards: the K rewards.
        results: sample_id -> K results.
        report: what happened meanwhile; its faults are filled in here.
    """
    names = tuple(reward.name for reward in rewards)
    column = {name: index for index, name in enumerate(names)}
    sample_ids = sorted(results)
    raw = [results[sample_id] for sample_id in sample_ids]
    gated = [
        [
            _gate(result, row[column[reward.when.reward]], reward.when) if reward.when else result
            for reward, result in zip(rewards, row, strict=True)
        ]
        for row in raw
    ]
    reasons: dict[tuple[int, str], str] = {}
    num_invalid = {name: Counter[str]() for name in names}
    num_not_applicable = dict.fromkeys(names, 0)
    tracebacks: dict[str, str] = {}
    for sample_id, row in zip(sample_ids, gated, strict=True):
        for name, result in zip(names, row, strict=True):
            if isinstance(result, Invalid):
                reasons[sample_id, name] = str(result)
                num_invalid[name][result.reason] += 1
                if result.traceback:
                    tracebacks.setdefault(name, result.traceback)
            elif isinstance(result, NotApplicable):
                reasons[sample_id, name] = result.value
                num_not_applicable[name] += 1

    counts = {name: dict(of_reasons) for name, of_reasons in num_invalid.items()}
    values = _as_tensor(gated, len(names))
    return RewardScores(
        names=names,
        sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
        raw=_as_tensor(raw, len(names)),
        values=values,
        valid=~values.isnan(),
        not_applicable=torch.tensor(
            [[result is NOT_APPLICABLE for result in row] for row in gated], dtype=torch.bool
        ).reshape(-1, len(names)),
        reasons=reasons,
        num_invalid=counts,
        num_not_applicable=num_not_applicable,
        tracebacks=tracebacks,
        report=replace(report or RewardReport(), num_invalid=counts, tracebacks=tracebacks),
    )


def _gate(result: RewardResult, condition: RewardResult, gate: GateConfig) -> RewardResult:
    if isinstance(result, Invalid | NotApplicable):
        return result
    if isinstance(condition, Invalid):
        return Invalid("condition missing", f"'{gate.reward}': {condition}")
    if isinstance(condition, NotApplicable):
        return condition
    return result if condition >= gate.gte else 0.0


def _as_tensor(rows: Sequence[Sequence[RewardResult]], num_columns: int) -> Tensor:
    scores = [[cell if isinstance(cell, float) else math.nan for cell in row] for row in rows]
    return torch.tensor(scores, dtype=torch.float64).reshape(-1, num_columns)
