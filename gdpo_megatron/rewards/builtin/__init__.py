"""The built-in rewards; importing this package registers them."""

from gdpo_megatron.rewards.builtin import gsm8k, length, math, text, tool_call

__all__ = ["gsm8k", "length", "math", "text", "tool_call"]
