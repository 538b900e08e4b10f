"""Reward matrices for the tests, and a slow reference written from the formulas alone."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

from gdpo_megatron.types import RewardMatrix

NAMES = ("correct", "format", "length", "tone", "tool", "brief", "safe", "cite")


def matrix(values, group_ids, valid=None, names=None, dtype=torch.float64) -> RewardMatrix:
    values = torch.as_tensor(values, dtype=dtype)
    if values.ndim == 1:
        values = values[:, None]
    valid = torch.ones_like(values, dtype=torch.bool) if valid is None else torch.as_tensor(valid)
    return RewardMatrix(
        names or NAMES[: values.shape[1]], values, valid, torch.as_tensor(group_ids).long()
    )


def permuted(rewards: RewardMatrix, order: torch.Tensor) -> RewardMatrix:
    return RewardMatrix(
        rewards.names, rewards.values[order], rewards.valid[order], rewards.group_ids[order]
    )


def std(values: list[float], ddof: int = 1) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - ddof))


def slow_gdpo_combined(rewards: RewardMatrix, weights: list[float], eps: float) -> list[float]:
    """Eq. 4 and 7 with missing entries left out: Python floats, loops, nothing shared with ours."""
    rows = range(len(rewards.group_ids))
    combined = [0.0 for _ in rows]
    for group in set(rewards.group_ids.tolist()):
        members = [i for i in rows if rewards.group_ids[i] == group]
        for k, weight in enumerate(weights):
            have = [i for i in members if rewards.valid[i, k]]
            values = [float(rewards.values[i, k]) for i in have]
            if len(values) < 2 or max(values) == min(values):
                continue
            mean = math.fsum(values) / len(values)
            for i, value in zip(have, values, strict=True):
                combined[i] += weight * (value - mean) / (std(values) + eps)
    return combined


@st.composite
def reward_matrices(draw, max_rows: int = 24, max_rewards: int = 4, missing: bool = True):
    """Rewards as they occur: few levels, ties, odd offsets, any groups, missing entries as NaN."""
    num_rows = draw(st.integers(1, max_rows))
    num_rewards = draw(st.integers(1, max_rewards))
    level = st.sampled_from([0.0, 1.0, -1.0, 0.1, 0.7, 0.3, 3.0, -3.0, 1e-3, 1234.5])
    number = st.one_of(level, st.floats(-1e3, 1e3, width=32))
    values = torch.tensor(
        draw(
            st.lists(
                st.lists(number, min_size=num_rewards, max_size=num_rewards),
                min_size=num_rows,
                max_size=num_rows,
            )
        ),
        dtype=torch.float32,
    )
    group_ids = torch.tensor(
        draw(st.lists(st.integers(0, 4), min_size=num_rows, max_size=num_rows))
    )
    valid = torch.ones_like(values, dtype=torch.bool)
    if missing:
        flags = st.lists(st.integers(0, 4), min_size=values.numel(), max_size=values.numel())
        valid = torch.tensor(draw(flags)).reshape(values.shape) > 0
        values = torch.where(valid, values, torch.nan)
    return RewardMatrix(NAMES[:num_rewards], values, valid, group_ids * 7 - 3)
