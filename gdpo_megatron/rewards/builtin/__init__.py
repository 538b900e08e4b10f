"""The built-in rewards; importing this package registers them."""

from gdpo_megatron.rewards.builtin import (
    code,
    environment,
    gsm8k,
    json_schema,
    length,
    math,
    overlong,
    regex_match,
    repetition,
    reward_model,
    text,
    tool_call,
)

__all__ = [
    "code",
    "environment",
    "gsm8k",
    "json_schema",
    "length",
    "math",
    "overlong",
    "regex_match",
    "repetition",
    "reward_model",
    "text",
    "tool_call",
]
