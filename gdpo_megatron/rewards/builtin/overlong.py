"""Overlong: no penalty up to a limit, then a linear one down to -1.

Source: DAPO (arXiv 2503.14476), eq. 13, "soft overlong punishment". Its L_max - L_cache is `limit`
and its L_cache is `buffer`:

    0                          num_tokens <= limit
    (limit - num_tokens) / buffer    limit < num_tokens <= limit + buffer
    -1                         beyond
"""

from __future__ import annotations

from gdpo_megatron.config.section import PositiveInt
from gdpo_megatron.rewards.base import RewardResult, RewardSample, register_reward


def overlong_penalty(num_tokens: int, limit: int, buffer: int) -> float:
    """The penalty for a completion of `num_tokens`, in [-1, 0]; see above."""
    return -min(max(num_tokens - limit, 0) / buffer, 1.0) + 0.0  # no negative zero


@register_reward("overlong")
def overlong(sample: RewardSample, limit: PositiveInt, buffer: PositiveInt) -> RewardResult:
    """`overlong_penalty` of the completion.

    One that was cut is judged by the tokens it has; let `rollout.max_completion_tokens` be at least
    limit + buffer, so that it gets -1.
    """
    return overlong_penalty(sample.num_tokens, limit, buffer)
