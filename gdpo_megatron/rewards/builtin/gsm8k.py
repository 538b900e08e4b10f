"""GSM8K: right answer, integer answer, well-formed answer; as in the paper's released code.

Source: NVlabs/GDPO, trl-GDPO/open-r1/src/open_r1/gsm8k.py. Answers compare as strings, and
`str.isdigit` accepts neither sign nor comma but superscript digits: for the 98 golds like "1,600"
or "-3", a right answer is no integer. The format is not stripped; one final newline passes.

With `normalized=True` an answer is an integer if it is ASCII digits, commas left out, after an
optional sign; integers compare as such, in answer and gold alike. Then every right answer is one.
"""

from __future__ import annotations

import re

from gdpo_megatron.rewards.base import (
    NOT_APPLICABLE,
    RewardResult,
    RewardSample,
    register_reward,
)

_INTEGER = re.compile(r"([+-]?)0*([0-9]+)")
_FORMAT = re.compile(r"^<think>.*?</think>\n<answer>.*?</answer>$", re.DOTALL)


def gold_answer(answer: str) -> str:
    """The gold string: what follows `####` in a GSM8K answer, or all of an answer without it."""
    return (answer.split("####")[1] if "####" in answer else answer).strip()


def correctness_reward(completion: str, answer: str, *, normalized: bool = False) -> float:
    """1.0 if the completion's answer is the gold, else 0.0.

    Args:
        completion: the last `<answer>` counts; without tags, the whole text.
        answer: the gold string, or GSM8K's full answer with its `####`.
        normalized: compare as integers instead of as strings.

    Raises:
        ValueError: the gold is no integer, and `normalized`.
    """
    found, gold = _extract(completion), gold_answer(answer)
    if not normalized:
        return 1.0 if found == gold else 0.0
    expected = _normalized(gold)
    if expected is None:
        raise ValueError(f"gold {gold!r} is no integer; leave out normalized")
    return 1.0 if _normalized(found) == expected else 0.0


def integer_reward(completion: str, *, normalized: bool = False) -> float:
    """1.0 if the completion's answer is an integer, else 0.0.

    Args:
        completion: the last `<answer>` counts; without tags, the whole text.
        normalized: allow a sign and commas and take ASCII digits only, instead of `str.isdigit`.
    """
    found = _extract(completion)
    is_integer = _normalized(found) is not None if normalized else found.isdigit()
    return 1.0 if is_integer else 0.0


def format_reward(completion: str) -> float:
    """1.0 for a `<think>` block, a newline and the only `<answer>` block; else 0.0."""
    # Counting first keeps the search linear on text full of closing tags.
    if completion.count("<answer>") != 1 or completion.count("</answer>") != 1:
        return 0.0
    return 1.0 if _FORMAT.search(completion) else 0.0


def validate_answer(answer: str) -> None:
    """Check, when data is loaded, that there is a gold string; raises ValueError if not."""
    if not gold_answer(answer):
        raise ValueError(f"answer {answer!r} holds no gold string (after '####', where it has one)")


def _extract(completion: str) -> str:
    return completion.split("<answer>")[-1].split("</answer>")[0].strip()


def _normalized(text: str) -> tuple[bool, str] | None:
    # Not int(): it refuses numbers of more than 4,300 digits.
    match = _INTEGER.fullmatch(text.replace(",", ""))
    return None if match is None else (match[1] == "-" and match[2] != "0", match[2])


@register_reward("gsm8k_correctness", check_answer=validate_answer)
def gsm8k_correctness(sample: RewardSample, normalized: bool = False) -> RewardResult:
    """`correctness_reward` against the row's answer; does not apply to rows without one."""
    if sample.answer is None:
        return NOT_APPLICABLE
    return correctness_reward(sample.completion, sample.answer, normalized=normalized)


@register_reward("gsm8k_integer")
def gsm8k_integer(sample: RewardSample, normalized: bool = False) -> RewardResult:
    """`integer_reward` of the completion."""
    return integer_reward(sample.completion, normalized=normalized)


@register_reward("gsm8k_format")
def gsm8k_format(sample: RewardSample) -> RewardResult:
    """`format_reward` of the completion."""
    return format_reward(sample.completion)
