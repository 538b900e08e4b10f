"""Rewards of one's own, in a file next to the config: each form once, for stories.

gdpo.yaml names them as `./my_rewards.py:<function>`; test_my_rewards.py tests them.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Sequence

from gdpo_megatron.rewards import (
    NOT_APPLICABLE,
    RewardResult,
    RewardSample,
    count_event,
    invalid,
    register_reward,
)


def words_used(sample: RewardSample, words: tuple[str, ...]) -> RewardResult:
    """Share of the words that the story uses; says nothing about an empty one."""
    text = sample.completion.lower()
    if not text.strip():
        count_event("empty")
        return NOT_APPLICABLE
    return sum(word in text for word in words) / len(words)


@register_reward("example_unlike_the_others", batch=True)
def unlike_the_others(samples: Sequence[RewardSample]) -> list[float]:
    """Batch form: share of a story's words that no other story of its group has."""
    stories = [set(re.findall(r"\w+", sample.completion.lower())) for sample in samples]
    num_stories = Counter(word for story in stories for word in story)
    return [sum(num_stories[word] == 1 for word in story) / max(len(story), 1) for story in stories]


async def judged(sample: RewardSample, seconds: float = 0.0) -> RewardResult:
    """Async form: here, a server would be asked; many calls wait side by side."""
    await asyncio.sleep(seconds)
    if not sample.completion.strip():
        return invalid("nothing to judge")
    return float(sample.completion.rstrip().endswith((".", "!", '"')))


class FirstOfItsKind:
    """Stateful form: 1 for an opening that no story had before in this run."""

    def __init__(self, num_words: int):
        self._num_words = num_words
        self._openings: set[tuple[str, ...]] = set()

    def __call__(self, sample: RewardSample) -> float:
        opening = tuple(sample.completion.lower().split()[: self._num_words])
        is_new = opening not in self._openings
        self._openings.add(opening)
        return float(is_new)


first_of_its_kind = register_reward("example_first_of_its_kind", stateful=True)(FirstOfItsKind(2))
