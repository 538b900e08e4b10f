"""GSM8K rewards in both forms: definitions, edge cases, and all 8,792 golds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdpo_megatron.rewards import NOT_APPLICABLE, RewardSample
from gdpo_megatron.rewards.builtin import gsm8k


def completion(answer: str) -> str:
    return f"<think>because</think>\n<answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("text", "correct", "integer", "well_formed"),
    [
        (completion("18"), 1.0, 1.0, 1.0),
        (completion(" 18\n"), 1.0, 1.0, 1.0),
        (completion("18") + "\n", 1.0, 1.0, 1.0),  # `$` lets one final newline pass
        (completion("18") + "\n\n", 1.0, 1.0, 0.0),
        (" " + completion("18"), 1.0, 1.0, 0.0),
        (completion("17"), 0.0, 1.0, 1.0),
        (completion("18.0"), 0.0, 0.0, 1.0),
        (completion("-18"), 0.0, 0.0, 1.0),
        (completion("\u00b2"), 0.0, 1.0, 1.0),  # superscript two: a digit to str.isdigit
        (completion("\uff11\uff18"), 0.0, 1.0, 1.0),  # full-width 18: digits, another string
        (completion("\u2160"), 0.0, 0.0, 1.0),  # Roman numeral one
        ("18", 1.0, 1.0, 0.0),  # without tags the whole text is compared
        ("", 0.0, 0.0, 0.0),
        ("<answer>18", 1.0, 1.0, 0.0),
        ("18</answer> 19", 1.0, 1.0, 0.0),
        ("<answer>1</answer><answer>18</answer>", 1.0, 1.0, 0.0),  # the last one counts
        ("<answer><answer>18</answer></answer>", 1.0, 1.0, 0.0),
        ("<think></think><answer>18</answer>", 1.0, 1.0, 0.0),
        ("<think>a</think>b</think>\n<answer>18</answer>", 1.0, 1.0, 1.0),
        ("<answer>" * 12_500, 0.0, 0.0, 0.0),
        ("<think>" + "</think>\n" * 12_500 + "<answer>18</answer>", 1.0, 1.0, 1.0),
        ("1" * 100_000, 0.0, 1.0, 0.0),
    ],
)
def test_definitions(text: str, correct: float, integer: float, well_formed: float):
    assert gsm8k.correctness_reward(text, "18") == correct
    assert gsm8k.integer_reward(text) == integer
    assert gsm8k.format_reward(text) == well_formed


def test_full_answers_are_accepted():
    full = "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs.\n#### 18"
    assert gsm8k.gold_answer(full) == "18"
    assert gsm8k.correctness_reward(completion("18"), full) == 1.0
    assert gsm8k.correctness_reward(completion("9"), full) == 0.0
    gsm8k.validate_answer(full)
    for empty in ("", "so:\n#### ", "  "):
        with pytest.raises(ValueError, match="holds no gold string"):
            gsm8k.validate_answer(empty)


def test_registered_forms():
    sample = RewardSample(completion=completion("18"), answer="#### 18")
    assert gsm8k.gsm8k_correctness(sample) == 1.0
    assert gsm8k.gsm8k_integer(sample) == 1.0
    assert gsm8k.gsm8k_format(sample) == 1.0
    without = RewardSample(completion=completion("18"))
    assert gsm8k.gsm8k_correctness(without) is NOT_APPLICABLE
    assert gsm8k.gsm8k_integer(without) == 1.0


@pytest.mark.parametrize(
    ("text", "gold", "correct", "integer"),
    [
        ("1,600", "1600", 1.0, 1.0),
        ("1600", "1,600", 1.0, 1.0),
        ("1,600", "1,600", 1.0, 1.0),
        ("-3", "-3", 1.0, 1.0),
        ("+3", "3", 1.0, 1.0),
        ("-3", "3", 0.0, 1.0),
        ("-0", "0", 1.0, 1.0),
        ("007", "7", 1.0, 1.0),
        ("3.0", "3", 0.0, 0.0),
        ("$3", "3", 0.0, 0.0),
        ("3 ", "3", 1.0, 1.0),
        ("1 600", "1600", 0.0, 0.0),
        ("--3", "-3", 0.0, 0.0),
        ("", "0", 0.0, 0.0),
        (",", "0", 0.0, 0.0),
        ("-", "0", 0.0, 0.0),
        ("\u00b2", "2", 0.0, 0.0),  # superscript two
        ("\uff11\uff18", "18", 0.0, 0.0),  # full-width 18
        ("\u0661", "1", 0.0, 0.0),  # Arabic-Indic one
        ("\u22123", "-3", 0.0, 0.0),  # a minus sign that is no hyphen
        ("1" * 100_000, "1" * 100_000, 1.0, 1.0),
    ],
)
def test_normalized(text: str, gold: str, correct: float, integer: float):
    assert gsm8k.correctness_reward(completion(text), gold, normalized=True) == correct
    assert gsm8k.integer_reward(completion(text), normalized=True) == integer
    sample = RewardSample(completion=completion(text), answer=f"#### {gold}")
    assert gsm8k.gsm8k_correctness(sample, normalized=True) == correct
    assert gsm8k.gsm8k_integer(sample, normalized=True) == integer


def test_normalized_needs_an_integer_gold():
    with pytest.raises(ValueError, match=r"gold '1\.5' is no integer"):
        gsm8k.correctness_reward(completion("1.5"), "1.5", normalized=True)


@given(st.text(max_size=50))
def test_any_text_has_scores_and_a_right_answer_is_an_integer(text: str):
    for normalized in (False, True):
        assert gsm8k.correctness_reward(text, "-1,600", normalized=normalized) in (0.0, 1.0)
        assert gsm8k.integer_reward(text, normalized=normalized) in (0.0, 1.0)
    assert gsm8k.format_reward(text) in (0.0, 1.0)
    if gsm8k.correctness_reward(text, "1600", normalized=True):
        assert gsm8k.integer_reward(text, normalized=True)


def test_every_gold_is_correct_and_98_are_no_integers(read_rows):
    rows = read_rows("gsm8k/train.jsonl") + read_rows("gsm8k/test.jsonl")
    assert len(rows) == 8792
    not_integer: list[str] = []
    for row in rows:
        gsm8k.validate_answer(row["answer"])
        gold = gsm8k.gold_answer(row["answer"])
        assert gsm8k.correctness_reward(completion(gold), row["answer"]) == 1.0
        assert gsm8k.format_reward(completion(gold)) == 1.0
        assert gsm8k.correctness_reward(completion(gold), row["answer"], normalized=True) == 1.0
        assert gsm8k.integer_reward(completion(gold), normalized=True) == 1.0
        if not gsm8k.integer_reward(completion(gold)):
            not_integer.append(gold)
    assert sum("," in gold for gold in not_integer) == 93
    assert sum(gold.startswith("-") for gold in not_integer) == 5
    assert len(not_integer) == 98
