"""Rewards: the contract (base), the built-in ones (builtin), and what runs them (suite).

Importing this package registers the built-in rewards. The suite is imported by its own name,
`gdpo_megatron.rewards.suite`, because it needs torch and the launcher's check does not.
"""

from gdpo_megatron.rewards import builtin as builtin
from gdpo_megatron.rewards.base import (
    NOT_APPLICABLE,
    REWARDS,
    Invalid,
    NotApplicable,
    RewardFn,
    RewardResult,
    RewardSample,
    count_event,
    invalid,
    register_reward,
)
from gdpo_megatron.rewards.resolve import ResolvedReward, resolve_rewards

__all__ = [
    "NOT_APPLICABLE",
    "REWARDS",
    "Invalid",
    "NotApplicable",
    "ResolvedReward",
    "RewardFn",
    "RewardResult",
    "RewardSample",
    "count_event",
    "invalid",
    "register_reward",
    "resolve_rewards",
]
