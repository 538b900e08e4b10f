"""Repetition: the share of n-grams of words that occurred before, as a penalty.

    -(1 - distinct n-grams / all n-grams)

Source: Demystifying Long Chain-of-Thought Reasoning (arXiv 2502.03373), appendix C.2, as a single
number per completion like in open-r1: words are what stands between blanks, in lower case; a text
shorter than one n-gram has no penalty. Their `max_penalty` is the reward's weight here.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from gdpo_megatron.rewards.base import RewardResult, RewardSample, register_reward

Unit: TypeAlias = Literal["word", "character"]


def repetition_penalty(completion: str, ngram_size: int, *, unit: Unit = "word") -> float:
    """The penalty of a completion, in (-1, 0].

    Args:
        completion: the text.
        ngram_size: units in an n-gram, at least 1.
        unit: "character" for scripts that put no blanks between words.
    """
    text = completion.lower()
    units = text.split() if unit == "word" else text
    num_ngrams = len(units) - ngram_size + 1
    if num_ngrams <= 0:
        return 0.0
    distinct = {tuple(units[start : start + ngram_size]) for start in range(num_ngrams)}
    return len(distinct) / num_ngrams - 1.0


@register_reward("repetition")
def repetition(
    sample: RewardSample, ngram_size: Annotated[int, Field(ge=1, le=100)], unit: Unit = "word"
) -> RewardResult:
    """`repetition_penalty` of the completion."""
    return repetition_penalty(sample.completion, ngram_size, unit=unit)
