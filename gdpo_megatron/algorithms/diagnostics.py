"""What the advantages of a step are made of: shares, conflicts, cancellation, lost distinctions.

Everything is computed from the same rewards that the update uses, over the rollouts that enter the
loss, before eq. 6 unless said otherwise. A metric that is not defined for a batch (a correlation
with a constant, say) is absent from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor

from gdpo_megatron.algorithms.advantages import compute_advantages, resolve_weights
from gdpo_megatron.algorithms.groups import Groups, sort_into_groups
from gdpo_megatron.algorithms.loss_stats import MetricInfo
from gdpo_megatron.config.advantage import AdvantageConfig
from gdpo_megatron.types import AdvantageBatch, RewardMatrix

_COMPARED = ("gdpo", "grpo", "grpo_no_std")
_DISTINCT_DECIMALS = 6

# {reward} stands for a reward's name, {pair} for two of them, "a|b", in config order.
DIAGNOSTICS: Mapping[str, MetricInfo] = {
    "variance_share/{reward}": MetricInfo(
        "share", "Cov(w_k A_k, A_sum) / Var(A_sum); adds up to 1 over rewards, may be negative"
    ),
    "abs_share/{reward}": MetricInfo("share", "sum |w_k A_k| over that of all rewards"),
    "groups_without_signal/{reward}": MetricInfo("share", "groups in which A_k is 0 throughout"),
    "groups_without_signal": MetricInfo("share", "groups in which A_sum is 0 throughout"),
    "groups_cancelled": MetricInfo("share", "groups with some A_k but A_sum 0 throughout"),
    "saturated_high/{reward}": MetricInfo(
        "share", "scored groups constant at the largest value of the batch"
    ),
    "saturated_low/{reward}": MetricInfo(
        "share", "scored groups constant at the smallest value of the batch"
    ),
    "missing/{reward}": MetricInfo("share", "rollouts without a valid value"),
    "conflict/{pair}": MetricInfo(
        "share", "rollouts with w_a A_a and w_b A_b of opposite sign, of those with both not 0"
    ),
    "cancellation/{pair}": MetricInfo(
        "share", "1 - sum |w_a A_a + w_b A_b| / sum (|w_a A_a| + |w_b A_b|)"
    ),
    "correlation/{pair}": MetricInfo("1", "Pearson correlation of A_a and A_b over rollouts"),
    "cancellation": MetricInfo("share", "1 - sum |A_sum| / sum_k sum |w_k A_k|"),
    "sign_differs_from_grpo": MetricInfo(
        "share", "rollouts whose advantage has another sign than GRPO's, of those with either not 0"
    ),
    "num_distinct_gdpo": MetricInfo("values", "different values of A_sum under gdpo, to 1e-6"),
    "num_distinct_grpo": MetricInfo("values", "the same under grpo"),
    "num_distinct_grpo_no_std": MetricInfo("values", "the same under grpo_no_std"),
    "length_correlation": MetricInfo(
        "1", "Pearson correlation of the advantage after eq. 6 with completion tokens"
    ),
    "advantage_abs_max": MetricInfo("1", "largest |advantage| after eq. 6, floor and cap"),
    "zero_advantages": MetricInfo("share", "rollouts of the loss whose advantage is 0"),
    "batch_mean": MetricInfo("1", "mean_B A_sum of eq. 6; 0 per rollout unless rows were dropped"),
    "batch_std": MetricInfo("1", "std_B A_sum of eq. 6, before floor and eps"),
    "batch_std_floor_active": MetricInfo("share", "1 if batch_std_floor was above batch_std"),
    "num_capped": MetricInfo("rollouts", "advantages that advantage_cap bounded"),
    "num_dropped_for_conflict": MetricInfo("rollouts", "rollouts that gd2po left out"),
    "num_rows": MetricInfo("rollouts", "rollouts of the step"),
    "num_loss_rows": MetricInfo("rollouts", "rollouts that enter the loss"),
    "num_groups": MetricInfo("groups", "groups of the step"),
}


def diagnostic_names(reward_names: tuple[str, ...]) -> dict[str, MetricInfo]:
    """DIAGNOSTICS with the names of a run put in."""
    pairs = [f"{a}|{b}" for a, b in combinations(reward_names, 2)]
    names: dict[str, MetricInfo] = {}
    for pattern, info in DIAGNOSTICS.items():
        if "{reward}" in pattern:
            names |= {pattern.format(reward=name): info for name in reward_names}
        elif "{pair}" in pattern:
            names |= {pattern.format(pair=pair): info for pair in pairs}
        else:
            names[pattern] = info
    return names


@torch.no_grad()
def advantage_diagnostics(
    rewards: RewardMatrix,
    batch: AdvantageBatch,
    num_tokens: Tensor | None,
    config: AdvantageConfig,
) -> dict[str, float]:
    """Describe the advantages of a step.

    Args:
        rewards: [B, K], what `batch` was computed from.
        batch: result of compute_advantages.
        num_tokens: [B] completion tokens, or None.
        config: what `batch` was computed with.

    Returns:
        Values by names of `diagnostic_names`, and the numbers of `batch.stats`.
    """
    groups, order = sort_into_groups(rewards.group_ids.cpu())
    order = torch.arange(len(rewards.group_ids)) if order is None else order
    used = batch.loss_rows.cpu()[order]
    weights = resolve_weights(config.weights, rewards.names)
    parts = batch.per_reward.cpu()[order] * weights * used[:, None]
    combined = torch.where(used, batch.combined.cpu()[order], 0.0)
    advantages = batch.advantages.cpu()[order]
    if len(order) == 0:
        return dict(batch.stats)
    metrics = dict(batch.stats)
    metrics |= _share_metrics(rewards.names, parts[used])
    metrics |= dict(_group_metrics(rewards, order, groups, parts, combined))
    metrics |= dict(_pair_metrics(rewards.names, parts[used]))
    metrics |= dict(_comparison_metrics(rewards, config, batch))
    if bool(used.any()):
        metrics["advantage_abs_max"] = float(advantages.abs().max())
        metrics["zero_advantages"] = float((advantages[used] == 0).double().mean())
    if num_tokens is not None:
        lengths = num_tokens.cpu()[order][used].double()
        _put(metrics, "length_correlation", _correlation(advantages[used], lengths))
    return metrics


def _put(metrics: dict[str, float], name: str, value: float | None) -> None:
    if value is not None:
        metrics[name] = value


def _correlation(a: Tensor, b: Tensor) -> float | None:
    """Pearson correlation of two vectors; None if one of them is constant."""
    if len(a) < 2 or bool(a.max() == a.min()) or bool(b.max() == b.min()):
        return None
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())


def _share_metrics(names: tuple[str, ...], parts: Tensor) -> dict[str, float]:
    """Shares of the rewards in the combined advantage; parts are w_k A_k, [n, K]."""
    metrics: dict[str, float] = {}
    if parts.numel() == 0:
        return metrics
    centred = parts - parts.mean(0)
    combined = centred.sum(1)
    variance, magnitude = combined.square().sum(), parts.abs().sum()
    if variance > 0:
        shares = (centred * combined[:, None]).sum(0) / variance
        metrics |= {f"variance_share/{n}": s for n, s in zip(names, shares.tolist(), strict=True)}
    if magnitude > 0:
        shares = parts.abs().sum(0) / magnitude
        metrics |= {f"abs_share/{n}": s for n, s in zip(names, shares.tolist(), strict=True)}
        metrics["cancellation"] = 1.0 - float(parts.sum(1).abs().sum() / magnitude)
    return metrics


def _group_metrics(
    rewards: RewardMatrix, order: Tensor, groups: Groups, parts: Tensor, combined: Tensor
) -> Iterator[tuple[str, float]]:
    """Groups without signal, cancelled or saturated; all rows in canonical order."""
    has_part = groups.reduce(parts.abs(), "max") > 0
    has_sum = groups.reduce(combined.abs(), "max") > 0
    yield "groups_without_signal", float((~has_sum).double().mean())
    yield "groups_cancelled", float((has_part.any(1) & ~has_sum).double().mean())
    values = rewards.values.detach().cpu()[order].double()
    valid = rewards.valid.cpu()[order]
    high = groups.reduce(values.masked_fill(~valid, -torch.inf), "max")
    low = groups.reduce(values.masked_fill(~valid, torch.inf), "min")
    scored = groups.reduce(valid.double(), "max") > 0
    for k, name in enumerate(rewards.names):
        yield f"groups_without_signal/{name}", float((~has_part[:, k]).double().mean())
        yield f"missing/{name}", float((~valid[:, k]).double().mean())
        top, bottom, among = high[:, k], low[:, k], scored[:, k]
        if bool(among.any()) and bool(top[among].max() > bottom[among].min()):
            constant = among & (top == bottom)
            num_scored = float(among.sum())
            at_top = float((constant & (top == top[among].max())).sum())
            at_bottom = float((constant & (bottom == bottom[among].min())).sum())
            yield f"saturated_high/{name}", at_top / num_scored
            yield f"saturated_low/{name}", at_bottom / num_scored


def _pair_metrics(names: tuple[str, ...], parts: Tensor) -> Iterator[tuple[str, float]]:
    """Conflict, cancellation and correlation of each pair; parts are w_k A_k, [n, K]."""
    for (i, a), (j, b) in combinations(enumerate(names), 2):
        x, y = parts[:, i], parts[:, j]
        both = (x != 0) & (y != 0)
        if bool(both.any()):
            yield f"conflict/{a}|{b}", float((x * y < 0).sum() / both.sum())
        magnitude = float((x.abs() + y.abs()).sum())
        if magnitude > 0:
            yield f"cancellation/{a}|{b}", 1.0 - float((x + y).abs().sum()) / magnitude
        correlation = _correlation(x, y)
        if correlation is not None:
            yield f"correlation/{a}|{b}", correlation


def _comparison_metrics(
    rewards: RewardMatrix, config: AdvantageConfig, batch: AdvantageBatch
) -> Iterator[tuple[str, float]]:
    """What GDPO, GRPO and GRPO without std make of the same rewards."""
    # Without batch stage and cap: eq. 6 scales all values alike, the cap would merge some.
    for name in _COMPARED:
        other = replace(config, estimator=name, batch_norm="none", advantage_cap=None)
        combined = compute_advantages(rewards, other).combined.cpu()[batch.loss_rows.cpu()]
        rounded = combined.round(decimals=_DISTINCT_DECIMALS) + 0.0
        yield f"num_distinct_{name}", float(rounded.unique().numel())
        if name == "grpo":
            sign, grpo_sign = batch.advantages.cpu()[batch.loss_rows.cpu()].sign(), combined.sign()
            either = (sign != 0) | (grpo_sign != 0)
            if bool(either.any()):
                differs = float(((sign != grpo_sign) & either).sum() / either.sum())
                yield "sign_differs_from_grpo", differs
