"""The rewards of my_rewards.py, called as plain functions: `pytest examples/custom_reward`."""

from __future__ import annotations

import asyncio

from my_rewards import FirstOfItsKind, judged, unlike_the_others, words_used

from gdpo_megatron.rewards import NOT_APPLICABLE, RewardSample, invalid


def story(text: str, **fields) -> RewardSample:
    return RewardSample(completion=text, **fields)


def test_words_used():
    assert words_used(story("The dog ran to the park."), words=("dog", "cat")) == 0.5
    assert words_used(story(" "), words=("dog",)) is NOT_APPLICABLE


def test_unlike_the_others():
    group = [story("a dog ran"), story("a cat ran"), story("a dog sat"), story("")]
    assert unlike_the_others(group) == [0.0, 1 / 3, 1 / 3, 0.0]


def test_judged():
    assert asyncio.run(judged(story("All was well."))) == 1.0
    assert asyncio.run(judged(story("and then"))) == 0.0
    assert asyncio.run(judged(story(" "))) == invalid("nothing to judge")


def test_first_of_its_kind():
    reward = FirstOfItsKind(num_words=2)
    assert [reward(story(text)) for text in ("Once upon", "A dog", "once upon a")] == [1, 1, 0]
