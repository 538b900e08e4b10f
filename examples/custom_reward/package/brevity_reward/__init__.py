"""A reward that other projects can install; pyproject.toml names it as an entry point."""

from __future__ import annotations

from gdpo_megatron.rewards import RewardSample


def brevity(sample: RewardSample, limit: int) -> float:
    """1 up to `limit` characters, then falling to 0 at twice as many."""
    return max(0.0, min(1.0, 2.0 - len(sample.completion) / limit))
