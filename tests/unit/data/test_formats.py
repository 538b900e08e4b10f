"""Formats of data sets, on rows written by hand; the real files are in test_asset_data.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from gdpo_megatron.data import formats
from gdpo_megatron.data.formats import FORMATS, BadAnswer, Format, OtherTask
from gdpo_megatron.data.row_pipeline import _answer_check
from gdpo_megatron.data.schema import BadField
from gdpo_megatron.rewards.builtin.code_tests import parse_tests
from gdpo_megatron.rewards.builtin.tool_call import correctness_reward, format_reward

CALL = '<tool_call>\n{"name": "A", "parameters": {"x": 1}}\n</tool_call>'
MESSAGES = [{"role": "user", "content": "use A"}]


def accepted(name: str, answer: str) -> bool:
    """Whether the format's reward could score this answer."""
    check = _answer_check(Format.of(FORMATS.get(name)).answer_reward, None)
    assert check is not None
    try:
        check(answer)
    except ValueError:
        return False
    return True


# ---- tool calls ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields", [{"ground_truth": CALL}, {"reward_model": {"ground_truth": CALL, "style": "rule"}}]
)
def test_toolrl(fields: Mapping[str, Any]):
    row = formats.toolrl({"prompt": MESSAGES, "split": "train", **fields})
    assert row == {"prompt": MESSAGES, "answer": CALL, "split": "train"}


@pytest.mark.parametrize(
    ("thinking", "rest"),
    [
        ("I write <tool_call> first", CALL),
        ("<tool_call>\n{}\n</tool_call> is the form", CALL),
        ("no <response> here", f"{CALL}\n<response> x </response>"),
        ("<response> or <tool_call>", "<response> x </response>"),
    ],
)
def test_tags_in_the_thinking_text_are_taken_out(thinking: str, rest: str):
    """As they are, such answers cannot be scored, or ask for another format than they have."""
    answer = f"<think> {thinking} </think>\n{rest}"
    assert not accepted("toolrl", answer)
    row = formats.toolrl({"prompt": MESSAGES, "ground_truth": answer})
    assert row["repaired"] == "tags in the answer's thinking text are taken out"
    assert accepted("toolrl", row["answer"])
    assert row["answer"].split("</think>\n")[1] == rest
    assert format_reward(row["answer"], row["answer"]) == 1.0
    assert correctness_reward(row["answer"], row["answer"]) == (3.0 if CALL in rest else 0.0)


def test_a_call_that_cannot_be_read_stays_bad():
    answer = "<think> a </think>\n<tool_call>\n{'name': 1}\n</tool_call>"
    assert formats.toolrl({"prompt": MESSAGES, "ground_truth": answer})["answer"] == answer
    assert not accepted("toolrl", answer)


# ---- GSM8K and mathematics -----------------------------------------------------------------------


@pytest.mark.parametrize("gold", ["4", "-3", "1,600", "2.5"])
def test_gsm8k(gold: str):
    solution = f"2 + 2 = <<2+2=4>>4\n#### {gold}"
    row = formats.gsm8k({"question": "2 + 2?", "answer": solution, "id": 7})
    assert row == {
        "prompt": "2 + 2?",
        "answer": gold,
        "solution": solution,
        "original": {"id": 7},
    }


@pytest.mark.parametrize("answer", ["4", "#### ", "#### four", "#### 3\n#### 4", "#### 4 apples"])
def test_gsm8k_golds_that_are_none(answer: str):
    with pytest.raises(BadAnswer, match="must end in '#### N', once"):
        formats.gsm8k({"question": "?", "answer": answer})


@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        ({"answer": r"\frac{1}{2}"}, r"\frac{1}{2}"),
        ({"answer": "025", "year": 1983}, "025"),
        ({"answer": 7}, "7"),
        ({"answer": ["2, 3"], "unit": None}, "2, 3"),
        ({"solution": r"so \boxed{\sqrt{2}} or \boxed{3}."}, "3"),
        ({"solution": "so 3", "answer": "3"}, "3"),
    ],
)
def test_math(fields: Mapping[str, Any], answer: str):
    row = formats.math({"problem": "?", **fields})
    assert row == {"prompt": "?", **fields, "answer": answer}
    assert accepted("math", row["answer"])


@pytest.mark.parametrize(
    "fields",
    [{}, {"answer": " "}, {"answer": ["1", "2"]}, {"answer": True}, {"solution": "no box"}],
)
def test_math_without_an_answer(fields: Mapping[str, Any]):
    with pytest.raises(BadAnswer, match="field 'answer' must be an expression"):
        formats.math({"problem": "?", **fields})


# ---- code ----------------------------------------------------------------------------------------


def code_tests(row: dict[str, Any]) -> dict[str, Any]:
    assert accepted("code", row["answer"])
    return json.loads(row["answer"])


def test_code_by_input_and_output():
    tests = {"inputs": ["1\n", "2\n"], "outputs": ["1", ["2", "3"]]}
    expected = {"inputs": ["1\n", "2\n"], "outputs": ["1", "2\n3"]}
    plain = formats.code({"problem": "echo", "tests": tests, "level": 2})
    assert code_tests(plain) == expected
    assert (plain["prompt"], plain["level"]) == ("echo", 2)
    eurus = formats.code(
        {
            "data_source": "taco",
            "prompt": MESSAGES,
            "ability": "code",
            "reward_model": {"ground_truth": json.dumps(tests), "style": "rule"},
            "extra_info": {"index": 0},
        }
    )
    assert code_tests(eurus) == expected
    assert eurus["prompt"] == MESSAGES
    assert {key: eurus[key] for key in ("ability", "data_source")} == {
        "ability": "code",
        "data_source": "taco",
    }


@pytest.mark.parametrize(
    ("prompt", "entry_point"), [("add", "add"), ("class Solution:\n  def add", "Solution().add")]
)
def test_code_by_calls(prompt: str, entry_point: str):
    tests = {"fn_name": "add", "inputs": ["1\n[2]", [3, 4]], "outputs": ["[3]", 7]}
    row = formats.code({"prompt": prompt, "ground_truth": tests})
    assert code_tests(row) == {
        "inputs": [[1, [2]], [3, 4]],
        "outputs": [[3], 7],
        "entry_point": entry_point,
    }
    tests["outputs"] = ["[[3]]", [7]]
    row = formats.code({"prompt": prompt, "ground_truth": tests}, unwrap_outputs=True)
    assert code_tests(row)["outputs"] == [[3], 7]


@pytest.mark.parametrize(
    ("tests", "problem"),
    [
        ("{", "tests are not JSON"),
        ("[]", "tests must be an object, are an empty list"),
        ({"fn_name": "f", "inputs": ["x"], "outputs": ["1"]}, "arguments 'x' (str) are not JSON"),
        ({"fn_name": "f", "inputs": ["1"], "outputs": ["x"]}, "value 'x' (str) is not JSON"),
        ({"fn_name": "f", "inputs": "1", "outputs": []}, "'inputs' of the tests must be a list"),
        ({"fn_name": 3, "inputs": [], "outputs": []}, "'fn_name' must be a text, is 3 (int)"),
    ],
)
def test_code_that_cannot_be_read(tests: Any, problem: str):
    with pytest.raises(BadAnswer) as error:
        formats.code({"problem": "?", "tests": tests})
    assert problem in str(error.value)


@pytest.mark.parametrize(
    "tests",
    [
        {"inputs": [], "outputs": []},
        {"inputs": ["1"], "outputs": []},
        {"inputs": [1], "outputs": ["1"]},
        {"inputs": ["1"]},
        {"fn_name": "f", "inputs": ["1"], "outputs": ["1", "2"]},
    ],
)
def test_code_tests_that_cannot_be_run(tests: Any):
    assert not accepted("code", formats.code({"problem": "?", "tests": tests})["answer"])


def test_code_of_another_ability():
    with pytest.raises(OtherTask, match="'ability' is 'math'"):
        formats.code({"ability": "math", "prompt": MESSAGES, "reward_model": {}})


def test_humaneval():
    prompt = "import math\n\ndef half(x):\n    return x / 2\n\ndef f(x):\n    '''Double.'''\n"
    row = formats.humaneval(
        {
            "task_id": "HumanEval/0",
            "prompt": prompt,
            "entry_point": "f",
            "canonical_solution": "    return 2 * x\n",
            "test": "def check(candidate):\n    assert candidate(1) == 2\n",
        }
    )
    assert (row["id"], row["prompt"]) == ("HumanEval/0", prompt)
    assert row["solution"] == prompt + "    return 2 * x\n"
    tests = code_tests(row)
    assert tests["prelude"] == "import math\n\ndef half(x):\n    return x / 2\n\n"
    assert tests["entry_point"] == "f" and len(parse_tests(row["answer"]).tests) == 1
    with pytest.raises(BadField, match="field 'prompt' has no 'def g\\('"):
        formats.humaneval({"task_id": "x", "prompt": prompt, "entry_point": "g", "test": ""})


def test_mbpp():
    row = formats.mbpp(
        {
            "text": "Add.",
            "code": "def add(a, b): return a + b",
            "task_id": 3,
            "test_setup_code": "k = 1",
            "test_list": ["assert add(1, 2) == 3", "assert add(k, 1) == 2"],
            "challenge_test_list": [],
        }
    )
    assert row["id"] == "mbpp/3" and row["problem"] == "Add."
    assert row["prompt"].endswith("assert add(1, 2) == 3\nassert add(k, 1) == 2")
    assert code_tests(row) == {
        "asserts": ["assert add(1, 2) == 3", "assert add(k, 1) == 2"],
        "setup": "k = 1",
    }
    assert row["solution"] == "def add(a, b): return a + b"
    with pytest.raises(BadAnswer, match="field 'test_list' must be asserts, is an empty list"):
        formats.mbpp({"text": "x", "task_id": 1, "test_list": []})


# ---- any rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "prompt", "answer"),
    [
        ({}, "p", "a"),
        ({"prompt_key": "deep.text", "answer_key": "deep.gold"}, "q", '{"b": "\u00e9"}'),
        ({"prompt_key": "dotted.key", "answer_key": "number"}, "r", "4.5"),
        ({"answer_key": None}, "p", None),
        ({"answer_key": "nothing"}, "p", None),
    ],
)
def test_rows(options: Any, prompt: str, answer: str | None):
    raw = {
        "id": 5,
        "prompt": "p",
        "answer": "a",
        "deep": {"text": "q", "gold": {"b": "\u00e9"}},
        "dotted.key": "r",
        "number": 4.5,
        "nothing": None,
    }
    row = formats.rows(raw, **options)
    assert (row["id"], row["prompt"], row["answer"]) == (5, prompt, answer)


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("promt", "no field 'promt'; did you mean 'prompt'?"),
        ("deep.txt", "no field 'deep.txt'; did you mean 'text'?"),
        ("prompt.x", "no field 'prompt.x'; choices: none"),
    ],
)
def test_rows_without_that_field(key: str, problem: str):
    with pytest.raises(BadField) as error:
        formats.rows({"prompt": "p", "answer": "", "deep": {"text": "q"}}, prompt_key=key)
    assert str(error.value) == problem
