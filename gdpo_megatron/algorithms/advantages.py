"""The advantage stage: rewards of a whole step in, one number per rollout out.

Missing entries, then the estimator on groups (each a file of its own), then the batch stage, floor
and cap. Always on the whole logical batch, in float64, on the CPU and in one canonical order, so
that the result knows nothing of ranks, minibatches, micro-batches or devices.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from gdpo_megatron.algorithms.batch_normalize import batch_normalize
from gdpo_megatron.algorithms.estimators import Estimate, GroupedRewards, resolve_estimator
from gdpo_megatron.algorithms.groups import sort_into_groups
from gdpo_megatron.config.advantage import AdvantageConfig
from gdpo_megatron.errors import InputError, did_you_mean
from gdpo_megatron.types import AdvantageBatch, RewardMatrix


@torch.no_grad()
def compute_advantages(
    rewards: RewardMatrix,
    config: AdvantageConfig,
    num_tokens: Tensor | None = None,
    *,
    base_dir: Path | None = None,
) -> AdvantageBatch:
    """Compute the advantages of a step's rollouts.

    Args:
        rewards: [B, K] raw rewards with group ids; rows in any order, groups of any sizes.
        config: the `advantage` section.
        num_tokens: [B] completion tokens, for batch_norm token.
        base_dir: folder that an estimator `./file.py:function` is relative to.

    Returns:
        Advantages with rows as in `rewards`, on its device; float64.

    Raises:
        InputError: weights that do not match the rewards, a missing reward where none may be,
            a valid entry that is not finite, ddof not below a group's size, unknown estimator.
    """
    estimator = resolve_estimator(config.estimator, base_dir)
    weights = resolve_weights(config.weights, rewards.names)
    groups, order = sort_into_groups(rewards.group_ids.cpu())
    values, valid = (
        _sorted(rewards.values.double().cpu(), order),
        _sorted(rewards.valid.cpu(), order),
    )
    tokens = None if num_tokens is None else _sorted(_checked_tokens(num_tokens, rewards), order)
    scored = valid.any(1)
    values, valid = _apply_missing(rewards, values, valid, config)

    estimate = estimator(GroupedRewards(rewards.names, values, valid, weights, groups), config)
    _check_estimate(estimate, values, config.estimator)
    keep = torch.ones_like(scored) if estimate.keep is None else estimate.keep
    if config.unscored_row == "exclude":
        keep = keep & scored
    stats = dict(estimate.stats)
    if config.batch_norm != "none" and len(rewards.names) >= config.batch_norm_min_rewards:
        stage = batch_normalize(estimate.combined, keep, tokens, config)
        advantages = stage.advantages
        stats |= {
            "batch_mean": stage.mean,
            "batch_std": stage.std,
            "batch_std_floor_active": float(stage.floor_active),
        }
    else:
        advantages = torch.where(keep, estimate.combined, 0.0)
    if config.advantage_cap is not None:
        cap = config.advantage_cap
        stats["num_capped"] = float((advantages.abs() > cap).sum())
        advantages = advantages.clamp(-cap, cap)
    stats["num_rows"] = float(len(scored))
    stats["num_loss_rows"] = float(keep.sum())
    stats["num_groups"] = float(len(groups.sizes))

    def back(rows: Tensor) -> Tensor:
        if order is not None:
            rows = torch.empty_like(rows).index_copy_(0, order, rows)
        return rows.to(rewards.values.device)

    return AdvantageBatch(
        advantages=back(advantages),
        per_reward=back(estimate.per_reward),
        combined=back(estimate.combined),
        stats=stats,
        loss_rows=back(keep),
    )


def resolve_weights(weights: object, names: tuple[str, ...]) -> Tensor:
    """Put weights by name into the order of `names`.

    Args:
        weights: name -> weight, or None for 1.0 each.
        names: K reward names.

    Returns:
        [K] float64.

    Raises:
        InputError: a name without weight or a weight without name; all of them are listed.
    """
    if weights is None:
        return torch.ones(len(names), dtype=torch.float64)
    assert hasattr(weights, "keys")
    by_name: dict[str, float] = dict(weights)  # pyright: ignore
    problems = [
        f"advantage.weights names '{name}', which is no reward of this batch; "
        f"{did_you_mean(name, names)}"
        for name in by_name
        if name not in names
    ]
    problems += [
        f"advantage.weights has no weight for reward '{name}'; give every reward one (0 leaves it "
        "out of the advantage)"
        for name in names
        if name not in by_name
    ]
    if problems:
        raise InputError(problems)
    return torch.tensor([by_name[name] for name in names], dtype=torch.float64)


def _sorted(rows: Tensor, order: Tensor | None) -> Tensor:
    return rows if order is None else rows.index_select(0, order)


def _checked_tokens(num_tokens: Tensor, rewards: RewardMatrix) -> Tensor:
    num_rows = rewards.values.shape[0]
    if num_tokens.shape != (num_rows,):
        raise InputError(f"num_tokens must be [{num_rows}], got {tuple(num_tokens.shape)}")
    if bool((num_tokens < 0).any()):
        raise InputError(f"num_tokens holds {num_tokens.min().item()}; lengths are not negative")
    return num_tokens.cpu()


def _apply_missing(
    rewards: RewardMatrix, values: Tensor, valid: Tensor, config: AdvantageConfig
) -> tuple[Tensor, Tensor]:
    """Zero the invalid entries and apply `missing`; refuse valid ones that are not finite."""
    if not bool(valid.all()):
        if config.missing == "error":
            row, k = (int(i) for i in (~rewards.valid.cpu()).nonzero()[0])
            name = rewards.names[k]
            why = (rewards.reasons or {}).get((row, name), "no reason given")
            raise InputError(
                f"advantage.missing is 'error' and row {row} has no reward '{name}' ({why}); "
                "missing: exclude leaves such entries out"
            )
        values = values.masked_fill(~valid, 0.0)
        if config.missing == "zero":
            scored = valid.any(1, keepdim=True)
            zeroed = scored.expand_as(valid)
            valid = torch.ones_like(valid) if config.unscored_row == "count" else zeroed
    # The sum is finite only if all are: one cheap pass, and the costly one to name the entry.
    if not math.isfinite(float(values.sum())) and not bool(torch.isfinite(values).all()):
        bad = ~torch.isfinite(rewards.values.cpu()) & rewards.valid.cpu()
        row, k = (int(i) for i in bad.nonzero()[0])
        raise InputError(
            f"reward '{rewards.names[k]}' of row {row} is {rewards.values[row, k].item()} but "
            "marked valid; a reward that cannot be computed must be marked invalid"
        )
    return values, valid


def _check_estimate(estimate: Estimate, values: Tensor, name: str) -> None:
    """Wrong shapes and non-finite results stop the run instead of spreading."""
    if estimate.per_reward.shape != values.shape or estimate.combined.shape != values.shape[:1]:
        raise InputError(
            f"advantage estimator '{name}' must return per_reward {tuple(values.shape)} and "
            f"combined {tuple(values.shape[:1])}, got {tuple(estimate.per_reward.shape)} and "
            f"{tuple(estimate.combined.shape)}"
        )
    if not bool(torch.isfinite(estimate.combined).all()):
        row = int((~torch.isfinite(estimate.combined)).nonzero()[0])
        raise InputError(
            f"advantage estimator '{name}' gives {estimate.combined[row].item()} for rewards "
            f"{values[row].tolist()}; it must return finite numbers"
        )
