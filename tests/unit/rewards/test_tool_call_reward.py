"""Tool-calling rewards against hand-computed values and real ground truths.

Not covered here: agreement with the released code on random input, which needs that code.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdpo_megatron.rewards import NOT_APPLICABLE, RewardSample
from gdpo_megatron.rewards.base import collect_events
from gdpo_megatron.rewards.builtin import tool_call
from gdpo_megatron.rewards.builtin.tool_call import (
    correctness_reward,
    format_reward,
    validate_ground_truth,
)


def call(name: str, **parameters: object) -> str:
    return json.dumps({"name": name, "parameters": parameters})


def answer(*calls: str, think: str = "<think> so </think>\n", response: str = "") -> str:
    tools = "<tool_call>\n" + "\n".join(calls) + "\n</tool_call>" if calls else ""
    return think + tools + (f"\n<response> {response} </response>" if response else "")


GOLD = answer(call("A", x=1, y="b"))
RESPONSE_GOLD = "<think> so </think>\n<response> hi </response>"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (GOLD, (1.0, 3.0)),
        # S = 1 name + 1 keys + 1 value of S_max = 4: 6 * 3/4 - 3
        (answer(call("A", x=1, y="c")), (1.0, 1.5)),
        (answer(call("B", x=1, y="b")), (1.0, -3.0)),
        # S = 1/2 names + 1 keys + 2 values: 6 * 3.5/4 - 3
        (answer(call("A", x=1, y="b"), call("B")), (1.0, 2.25)),
        (answer(call("A", x=1, y="b"), think=""), (0.0, 3.0)),
        ("", (0.0, -3.0)),
        ("<think> so </think>", (0.0, -3.0)),
        # keys {x, z} against {x, y}: Jaccard 1/3, one equal value: 6 * (1 + 1/3 + 1) / 4 - 3
        (answer(call("A", x=1, z=2)), (1.0, 6.0 * (1.0 + (1 / 3 + 1)) / 4.0 - 3.0)),
        # Values compare as in Python: True == 1 == 1.0, but "1" != 1.
        (answer(call("A", x=True, y="b")), (1.0, 3.0)),
        (answer(call("A", x=1.0, y="b")), (1.0, 3.0)),
        (answer(call("A", x="1", y="b")), (1.0, 1.5)),
        # Well-formed tags around something that is no JSON, not on one line, or no call.
        (answer("nothing"), (1.0, -3.0)),
        (answer(json.dumps({"name": "A", "parameters": {"x": 1}}, indent=1)), (1.0, -3.0)),
        (answer('{"name": "A"}'), (1.0, -3.0)),
        (answer('{"parameters": {}}'), (1.0, -3.0)),
        (answer('{"name": "A", "parameters": null}'), (1.0, -3.0)),
        (answer('{"name": ["A"], "parameters": {}}'), (1.0, -3.0)),
        (answer("[" + call("A", x=1, y="b") + "]"), (1.0, -3.0)),
        (answer("1"), (1.0, -3.0)),
        # A call of another name needs no parameters: they are never looked at.
        (answer(call("A", x=1, y="b"), '{"name": "B"}'), (1.0, 2.25)),
    ],
)
def test_one_gold_call(completion: str, expected: tuple[float, float]):
    assert (format_reward(completion, GOLD), correctness_reward(completion, GOLD)) == expected


def test_matching_is_greedy_in_gold_order():
    gold = answer(call("A", x=1, y=9), call("A", x=1, y=2))
    completion = answer(call("A", x=1, y=2), call("A", x=1, y=3))
    # Gold 1 takes prediction 1 (1 + 1), gold 2 is left with prediction 2 (1 + 1): S = 1 + 4 of 7.
    # Optimal matching would find 1 + 1 and 1 + 2: 2.142857.
    assert correctness_reward(completion, gold) == 6.0 * 5.0 / 7.0 - 3.0
    assert correctness_reward(completion, gold) == pytest.approx(1.285714, abs=1e-6)


def test_first_of_equally_good_predictions_wins_and_each_is_used_once():
    gold = answer(call("A", x=1), call("A", x=1))
    # The only good prediction serves gold 1; gold 2 gets the other: keys 1, value 0.
    completion = answer(call("A", x=1), call("A", x=2))
    assert correctness_reward(completion, gold) == 6.0 * (1.0 + 2.0 + 1.0) / 5.0 - 3.0
    # One prediction for two gold calls: names 1/2, the second gold call finds none left.
    completion = answer(call("A", x=1))
    assert correctness_reward(completion, gold) == 6.0 * (0.5 + 2.0) / 5.0 - 3.0


def test_right_calls_in_another_order_are_right():
    gold = answer(call("A", x=1), call("B", y=2))
    assert correctness_reward(answer(call("B", y=2), call("A", x=1)), gold) == 3.0


def test_calls_without_parameters_agree_on_their_keys():
    # S = 2/3 names + 1 (no keys on both sides) + 1 + 1, S_max = 1 + 1 + 2.
    gold = answer(call("A"), call("B", x=1))
    completion = answer(call("B", x=1), call("A"), call("C"))
    assert correctness_reward(completion, gold) == 6.0 * (2 / 3 + 1.0 + 2.0) / 4.0 - 3.0
    assert correctness_reward(answer(call("B", x=1), call("A")), gold) == 3.0
    assert correctness_reward(answer(call("A", z=1)), answer(call("A"))) == 6.0 * 1.0 / 2.0 - 3.0


def test_repeated_and_nested_tags():
    twice = GOLD + "\n<tool_call>\n" + call("B") + "\n</tool_call>"
    assert (format_reward(twice, GOLD), correctness_reward(twice, GOLD)) == (0.0, 3.0)
    # A second opening tag ends the block as much as a closing one does.
    nested = f"<tool_call>\n{call('A', x=1, y='b')}\n<tool_call>\nrest\n</tool_call>"
    assert (format_reward(nested, GOLD), correctness_reward(nested, GOLD)) == (0.0, 3.0)
    mentioned = answer(call("A", x=1, y="b"), think="<think> I use <tool_call> </think>\n")
    assert (format_reward(mentioned, GOLD), correctness_reward(mentioned, GOLD)) == (0.0, -3.0)
    unclosed = GOLD.removesuffix("</tool_call>")
    assert (format_reward(unclosed, GOLD), correctness_reward(unclosed, GOLD)) == (0.0, -3.0)
    # <think> is not counted.
    assert format_reward("<think>" + GOLD, GOLD) == 1.0


@pytest.mark.parametrize(
    ("gold", "completion", "expected"),
    [
        (RESPONSE_GOLD, RESPONSE_GOLD, 1.0),
        (RESPONSE_GOLD, "<think></think>\n<response></response>", 1.0),
        (RESPONSE_GOLD, "<think></think><response></response>", 0.0),
        (RESPONSE_GOLD, "<think></think>\n<response></response></response>", 0.0),
        (RESPONSE_GOLD, GOLD, 0.0),
        (answer(call("A"), response="r"), answer(call("B"), response="other"), 1.0),
        (answer(call("A"), response="r"), answer(call("B")), 0.0),
        ("<think>t</think>", "<think>other</think>", 1.0),
        ("<think>t</think>", "<think>other</think> more", 0.0),
        (GOLD, "\u2003\n" + GOLD + " \n\n", 1.0),  # stripped, Unicode blanks too
        (GOLD, "so: " + GOLD, 0.0),
    ],
)
def test_format_pattern_is_chosen_by_the_ground_truth(gold: str, completion: str, expected: float):
    assert format_reward(completion, gold) == expected


def test_gold_without_calls_is_constant_zero():
    for completion in ("", GOLD, RESPONSE_GOLD, "<tool_call>broken"):
        assert correctness_reward(completion, RESPONSE_GOLD) == 0.0


def test_nan_in_json_equals_itself_only_in_an_exact_list():
    # Python's list and dict comparison takes an object as equal to itself; json has one NaN object.
    gold = answer(call("A", x=float("nan")))
    assert correctness_reward(gold, gold) == 3.0
    # Not the exact list: now the value compares as NaN, unequal. S = 1/2 + 1 of 3.
    assert correctness_reward(answer(call("A", x=float("nan")), call("B")), gold) == 0.0


def test_large_and_deep_completions_are_answered():
    for hostile in (
        "a" * 100_000,
        GOLD + "x" * 100_000,
        "<think>" * 20_000,
        "</think>\n<tool_call>\n" * 5_000,
        "<think>" + "</think>\n<response>" * 5_000,
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
        "<tool_call>" + '{"a":' * 100_000 + "</tool_call>",
        '<tool_call>"' + '\\"' * 50_000 + "[" * 300 + "</tool_call>",
        "<tool_call>" + "9" * 100_000 + "</tool_call>",
        "<tool_call>" * 10_000 + "</tool_call>" * 10_000,
    ):
        for gold in (GOLD, RESPONSE_GOLD, answer(call("A"), response="r")):
            assert format_reward(hostile, gold) == 0.0
        assert correctness_reward(hostile, GOLD) in (-3.0, 3.0)
    long_thought = answer(call("A", x=1, y="b"), think=f"<think>{'a ' * 50_000}</think>\n")
    assert format_reward(long_thought, GOLD) == 1.0
    assert correctness_reward(long_thought, GOLD) == 3.0


def test_nesting_and_size_bounds():
    def deep(depth: int) -> str:
        nested = "[" * depth + "]" * depth
        return answer(f'{{"name": "A", "parameters": {{"x": {nested}}}}}')

    at_bound = tool_call.MAX_JSON_NESTING - 2
    assert correctness_reward(deep(at_bound), deep(at_bound)) == 3.0
    assert correctness_reward(deep(at_bound + 1), GOLD) == -3.0
    with pytest.raises(ValueError, match="nested deeper than 200"):
        validate_ground_truth(deep(at_bound + 1))
    # Brackets inside strings do not nest.
    text = answer(call("A", x="[{" * 500 + '\\"' + "[" * 500))
    assert correctness_reward(text, text) == 3.0
    padding = "x" * tool_call.MAX_COMPLETION_CHARS
    assert correctness_reward(GOLD + padding, GOLD) == -3.0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (answer("not json"), "call 1 is not JSON on one line"),
        (answer(call("A"), "{"), "call 2 is not JSON on one line"),
        (answer('{"name": "A"}'), "call 1: needs an object 'parameters'"),
        (answer('{"name": 1, "parameters": {}}'), "call 1: needs a string 'name'"),
        (answer("[]"), "call 1: not a JSON object"),
        ("<tool_call>\n\n</tool_call>", "call 1 is not JSON"),
        (answer(call("A"), think="<think> <tool_call> </think>\n"), "<tool_call> 2 times"),
        ("<think></think>\n<tool_call>\n" + call("A"), "</tool_call> 0 times"),
        ("</response><response>", "</response> before <response>"),
        ("42", "does data.answer_key name the right field"),
        ("", "does data.answer_key name the right field"),
    ],
)
def test_bad_ground_truths_are_refused_with_the_reason(text: str, reason: str):
    with pytest.raises(ValueError) as error:
        validate_ground_truth(text)
    assert reason in str(error.value)


def test_good_ground_truths_pass():
    for text in (
        GOLD,
        RESPONSE_GOLD,
        answer(call("A"), response="r"),
        "<think> only </think>",
        answer(call("A"), think=""),
    ):
        validate_ground_truth(text)


def test_unreadable_ground_truth_raises_and_is_never_a_score():
    with pytest.raises(ValueError, match="ground truth, call 1 is not JSON"):
        correctness_reward(GOLD, answer("{"))


def test_registered_forms():
    wrong = RewardSample(completion=answer(call("A", x=1, y="c")), answer=GOLD)
    assert tool_call.tool_call_format(wrong) == 1.0
    assert tool_call.tool_call_correctness(wrong) == 1.5
    without = RewardSample(completion=GOLD, answer=None)
    assert tool_call.tool_call_format(without) is NOT_APPLICABLE
    assert tool_call.tool_call_correctness(without) is NOT_APPLICABLE


def test_paper_mode_matches_optimally():
    gold = answer(call("A", x=1, y=9), call("A", x=1, y=2))
    completion = answer(call("A", x=1, y=2), call("A", x=1, y=3))
    # Names {A} both; gold 1 with prediction 2: 1 + 1, gold 2 with prediction 1: 1 + 2. S = 6 of 7.
    assert correctness_reward(completion, gold, "paper") == 6.0 * 6.0 / 7.0 - 3.0
    assert correctness_reward(completion, gold, "paper") == pytest.approx(2.142857, abs=1e-6)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (GOLD, 3.0),
        (answer(call("A", x=1, y="c")), 1.5),
        (answer(call("B", x=1, y="b")), -3.0),
        (answer(call("A", x=1, y="b"), call("B")), 2.25),  # names 1/2
        # A repeated call costs nothing: the names are a set.
        (answer(call("A", x=1, y="b"), call("A", x=1, y="b")), 3.0),
        (answer(call("A", x=1, y="b"), think="<think> by <tool_call> </think>\n"), 3.0),
        (answer(call("A", x=1, y="b"), think=""), 3.0),
        ("<think> <tool_call>\n" + call("A", x=1, y="b") + "\n</tool_call> </think>", -3.0),
        (answer("nothing"), -3.0),
        (answer('{"name": "A", "parameters": null}'), -3.0),
        (answer(call("A", x=1, y="b"), '{"name": 5, "parameters": {}}'), 2.25),
        ("", -3.0),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", -3.0),
    ],
)
def test_paper_mode(completion: str, expected: float):
    assert correctness_reward(completion, GOLD, mode="paper") == expected


def test_name_overlap_is_a_choice_of_its_own():
    # S_max = 4, S = names + 1 + 2; names A, A against A: 1/2 as multisets, 1 as sets.
    twice = answer(call("A", x=1, y="b"), call("A", x=1, y="b"))
    for mode in ("reference", "paper"):
        as_multiset = correctness_reward(twice, GOLD, mode, name_overlap="multiset")
        as_set = correctness_reward(twice, GOLD, mode, name_overlap="set")
        assert (as_multiset, as_set) == (6.0 * 3.5 / 4.0 - 3.0, 3.0)
    assert correctness_reward(twice, GOLD) == 2.25
    assert correctness_reward(twice, GOLD, "paper") == 3.0


def test_paper_mode_gold_without_calls_is_constant_zero():
    for completion in ("", GOLD, "<tool_call>broken"):
        assert correctness_reward(completion, RESPONSE_GOLD, "paper") == 0.0


CALLS = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.sampled_from("AB"),
            "parameters": st.dictionaries(st.sampled_from("xyz"), st.integers(0, 2), max_size=3),
        }
    ),
    min_size=1,
    max_size=4,
)


@given(gold=CALLS, predicted=CALLS, data=st.data())
def test_optimal_matching_is_no_worse_than_greedy_and_knows_no_order(
    gold: list[dict[str, Any]], predicted: list[dict[str, Any]], data: st.DataObject
):
    def text(calls: list[dict[str, Any]]) -> str:
        return answer(*[json.dumps(one) for one in calls])

    def optimal(gold: list[dict[str, Any]], predicted: list[dict[str, Any]]) -> float:
        return correctness_reward(text(predicted), text(gold), "paper", name_overlap="multiset")

    best = optimal(gold, predicted)
    greedy = correctness_reward(text(predicted), text(gold))
    assert -3.0 <= greedy <= best + 1e-12 <= 3.0 + 2e-12
    shuffled = data.draw(st.permutations(gold)), data.draw(st.permutations(predicted))
    assert optimal(*shuffled) == pytest.approx(best, abs=1e-12)
    assert optimal(gold, gold) == 3.0
    # The sum of the best pairs, by trying all of them.
    indices = list(range(max(len(gold), len(predicted))))
    by_hand = max(
        sum(
            _pair(gold[j], predicted[i])
            for j, i in enumerate(order)
            if j < len(gold) and i < len(predicted)
        )
        for order in itertools.permutations(indices)
    )
    names = Counter(g["name"] for g in gold), Counter(p["name"] for p in predicted)
    overlap = (names[0] & names[1]).total() / (names[0] | names[1]).total()
    best_possible = 1 + sum(1 + len(g["parameters"]) for g in gold)
    assert best == pytest.approx(6 * (overlap + by_hand) / best_possible - 3, abs=1e-12)


def _pair(gold: dict[str, Any], predicted: dict[str, Any]) -> float:
    if gold["name"] != predicted["name"]:
        return 0.0
    first, second = gold["parameters"], predicted["parameters"]
    union = first.keys() | second.keys()
    keys = len(first.keys() & second.keys()) / len(union) if union else 1.0
    return keys + len(first.items() & second.items())


PIECES = st.lists(st.sampled_from([*'<>/{}[]":,\n 1', "<tool_call>", "</tool_call>", call("A")]))


@given(PIECES.map("".join))
def test_any_completion_has_a_score(completion: str):
    for mode in ("reference", "paper"):
        for gold in (GOLD, RESPONSE_GOLD):
            assert -3.0 <= correctness_reward(completion, gold, mode) <= 3.0
            assert format_reward(completion, gold) in (0.0, 1.0)


def test_what_cannot_be_read_is_counted():
    with collect_events() as events:
        for mode in ("reference", "paper"):
            correctness_reward("", GOLD, mode)
            correctness_reward(answer("nothing"), GOLD, mode)
            correctness_reward(answer('{"name": "A"}'), GOLD, mode)
            correctness_reward(answer(call("B")), GOLD, mode)
    assert events == {"no_calls": 2, "unreadable_calls": 4}


@pytest.mark.parametrize(
    ("file", "num_tool", "num_response"), [("test", 71, 9), ("train", 328, 54)]
)
def test_real_ground_truths_are_maximal_against_themselves(
    read_rows, file: str, num_tool: int, num_response: int
):
    golds = [row["ground_truth"] for row in read_rows(f"toolrl/{file}.jsonl")]
    for gold in golds:
        validate_ground_truth(gold)
        assert format_reward(gold, gold) == 1.0
    for mode in ("reference", "paper"):
        scores = [correctness_reward(gold, gold, mode) for gold in golds]
        assert (scores.count(3.0), scores.count(0.0)) == (num_tool, num_response)
    assert len(golds) == num_tool + num_response
