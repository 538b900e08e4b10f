"""Length: 1 within a limit of generated tokens, 0 beyond; the boundary is inclusive.

Source: paper sec. 4.2, 1[length <= l]. Every generated token counts, thinking and stop token
included; the paper leaves the latter open. Make it conditional with `when:` (paper eq. 8).
"""

from __future__ import annotations

from gdpo_megatron.config.section import PositiveInt
from gdpo_megatron.rewards.base import RewardResult, RewardSample, register_reward


def length_reward(num_tokens: int, limit: int) -> float:
    """1.0 if `num_tokens` <= `limit`, else 0.0."""
    return 1.0 if num_tokens <= limit else 0.0


@register_reward("length")
def length(sample: RewardSample, limit: PositiveInt, count_stop_token: bool = True) -> RewardResult:
    """`length_reward` of the completion; 0.0 for one that was cut at the token limit.

    A cut completion would have gone on, so its length is not what was counted. This matters only
    where `rollout.max_completion_tokens` <= limit; beyond, a cut completion is too long anyway.
    """
    if sample.finish_reason == "length":
        return 0.0
    num_stop_tokens = int(sample.finish_reason == "stop" and not count_stop_token)
    return length_reward(sample.num_tokens - num_stop_tokens, limit)
