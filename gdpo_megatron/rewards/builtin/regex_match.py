r"""Regular expression: 1 where it matches, 0 elsewhere; bounded in time.

The package `regex` rather than Python's `re`: the same patterns and more, and its search stops
when its time is over, where a pattern like `^(a|aa)+$` takes `re` longer than the run. (RE2 needs
no such bound, but knows neither lookahead nor backreferences, which patterns of formats often use.)
Counted as event: `timeout`.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import regex
from pydantic import AfterValidator

from gdpo_megatron.config.section import PositiveFloat
from gdpo_megatron.rewards.base import (
    RewardResult,
    RewardSample,
    count_event,
    invalid,
    register_reward,
)

Where: TypeAlias = Literal["search", "match", "fullmatch"]
OnTimeout: TypeAlias = Literal["zero", "missing"]


def regex_reward(
    completion: str,
    pattern: str,
    *,
    where: Where = "search",
    timeout: float = 1.0,
    on_timeout: OnTimeout = "zero",
) -> float:
    """1.0 if the pattern matches, else 0.0.

    Args:
        completion: the text.
        pattern: in the syntax of Python's `re`; flags inline, as in `(?s)`.
        where: anywhere, at the start, or the whole text.
        timeout: seconds.
        on_timeout: what a completion is worth that takes longer.

    Raises:
        TimeoutError: it took longer, and on_timeout="missing".
    """
    find = getattr(regex.compile(pattern), where)
    try:
        return 1.0 if find(completion, timeout=timeout) else 0.0
    except TimeoutError:
        count_event("timeout")
        if on_timeout == "missing":
            raise
        return 0.0


def check_pattern(pattern: str) -> str:
    """Return the pattern, or raise ValueError with what is wrong with it."""
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"no regular expression: {error}") from error
    return pattern


@register_reward("regex")
def regex_match(
    sample: RewardSample,
    pattern: Annotated[str, AfterValidator(check_pattern)],
    where: Where = "search",
    timeout: PositiveFloat = 1.0,
    on_timeout: OnTimeout = "zero",
) -> RewardResult:
    """`regex_reward` of the completion."""
    try:
        return regex_reward(
            sample.completion, pattern, where=where, timeout=timeout, on_timeout=on_timeout
        )
    except TimeoutError:
        return invalid("regex timeout")
