"""Keyword, quoted speech and length."""

from __future__ import annotations

import pytest

from gdpo_megatron.rewards import RewardSample
from gdpo_megatron.rewards.builtin.length import length, length_reward
from gdpo_megatron.rewards.builtin.text import contains_reward, quoted_speech_reward


@pytest.mark.parametrize(
    ("text", "keyword", "ignore_case", "expected"),
    [
        ("The dog ran.", "dog", False, 1.0),
        ("The Dog ran.", "dog", False, 0.0),
        ("The Dog ran.", "dog", True, 1.0),
        ("dogma", "dog", False, 1.0),
        ("", "dog", False, 0.0),
        ("STRASSE", "stra\u00dfe", True, 1.0),
        ("d\u043eg", "dog", False, 0.0),  # a Cyrillic o
        ("x" * 100_000 + "dog", "dog", False, 1.0),
    ],
)
def test_contains(text: str, keyword: str, ignore_case: bool, expected: float):
    assert contains_reward(text, keyword, ignore_case=ignore_case) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('Tom said, "Hello, Lily!" and left.', 1.0),
        ('"Hi"', 1.0),
        ("\u201cHi,\u201d she said.", 1.0),
        ('He said "Hi and left.', 0.0),
        ("", 0.0),
        ('"" and "..." and "42"', 0.0),
        ('"42" and "yes"', 1.0),
        ('It is 5" wide and 7" high.', 0.0),
        ('It is 5" wide, "very wide".', 1.0),
        ('"one line\nanother"', 0.0),
        ("'Hi,' she said.", 0.0),
        ("\u201dHi\u201c", 0.0),
        ('"' + "a" * 100_000, 0.0),
        ('"' * 100_000, 0.0),
        ("\u201c" * 100_000 + "a", 0.0),
        ('"' + "a" * 100_000 + '"', 1.0),
        ('"\u4f60\u597d"', 1.0),
    ],
)
def test_quoted_speech(text: str, expected: float):
    assert quoted_speech_reward(text) == expected


def test_length_is_inclusive_and_a_cut_completion_is_too_long():
    assert [length_reward(n, 4) for n in (0, 3, 4, 5)] == [1.0, 1.0, 1.0, 0.0]

    def sample(num_tokens: int, finish_reason: str) -> RewardSample:
        return RewardSample(completion="", num_tokens=num_tokens, finish_reason=finish_reason)

    assert length(sample(4, "stop"), limit=4) == 1.0
    assert length(sample(5, "stop"), limit=4) == 0.0
    assert length(sample(4, "length"), limit=4) == 0.0
    assert length(sample(5, "length"), limit=4) == 0.0
    assert length(sample(5, "stop"), limit=4, count_stop_token=False) == 1.0
    assert length(sample(6, "stop"), limit=4, count_stop_token=False) == 0.0
