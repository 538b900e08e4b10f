"""Plain properties of a text: it holds a keyword, somebody speaks in it."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field

from gdpo_megatron.rewards.base import RewardResult, RewardSample, register_reward

# A pair of quotes on one line, outside of words (so that 5" is none); straight or typographic.
_QUOTED = re.compile('(?<!\\w)"([^"\n]*)"(?!\\w)|\u201c([^\u201c\u201d\n]*)\u201d')


def contains_reward(completion: str, keyword: str, *, ignore_case: bool = False) -> float:
    """1.0 if the completion contains the keyword (as a substring), else 0.0."""
    if ignore_case:
        completion, keyword = completion.casefold(), keyword.casefold()
    return 1.0 if keyword in completion else 0.0


def quoted_speech_reward(completion: str) -> float:
    """1.0 if the completion quotes an utterance, else 0.0.

    An utterance is a pair of double quotes with a letter between them, on one line.
    """
    for straight, typographic in _QUOTED.findall(completion):
        if any(character.isalpha() for character in straight or typographic):
            return 1.0
    return 0.0


@register_reward("contains")
def contains(
    sample: RewardSample, keyword: Annotated[str, Field(min_length=1)], ignore_case: bool = False
) -> RewardResult:
    """`contains_reward` of the completion."""
    return contains_reward(sample.completion, keyword, ignore_case=ignore_case)


@register_reward("quoted_speech")
def quoted_speech(sample: RewardSample) -> RewardResult:
    """`quoted_speech_reward` of the completion."""
    return quoted_speech_reward(sample.completion)
