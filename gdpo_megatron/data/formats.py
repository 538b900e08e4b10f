"""Formats of data sets: how a row of a file becomes one of the schema.

A format is a function of a row that returns the fields of the schema that it knows (`prompt` and
`answer`; `id` where the row has one of its own) and whatever else is to be kept. What it cannot
read it refuses with `BadField`. Each names the reward whose check says whether an answer can be
scored, the same that a run makes when it loads its data.

`FORMATS` is the table; a format of one's own is `./file.py:function` or an entry point.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from gdpo_megatron.data.schema import RESERVED_KEYS, BadField, describe
from gdpo_megatron.errors import did_you_mean
from gdpo_megatron.registry import Registry

Row: TypeAlias = Mapping[str, Any]
Convert: TypeAlias = Callable[..., dict[str, Any]]


class BadAnswer(BadField):
    """The row's ground truth cannot be read."""


class OtherTask(BadField):
    """The row is of another task than the format reads; nothing is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How to read a data set.

    Args:
        convert: called with a row, and with keyword arguments that it declares.
        answer_reward: type of the reward whose `check_answer` an answer must pass; None: any will
            do.
        summary: what files it is for.
    """

    convert: Convert
    answer_reward: str | None = None
    summary: str = ""

    @classmethod
    def of(cls, entry: Format | Convert) -> Format:
        """A format as it is, or one of a plain function."""
        return entry if isinstance(entry, Format) else cls(convert=entry)


FORMATS: Registry[Format | Convert] = Registry("data format", "gdpo_megatron.data_formats")


def register_format(
    name: str, *, answer_reward: str | None = None, summary: str = ""
) -> Callable[[Convert], Convert]:
    """Return a decorator that registers a function as a format and leaves it as it is."""

    def decorate(convert: Convert) -> Convert:
        FORMATS.add(name, Format(convert=convert, answer_reward=answer_reward, summary=summary))
        return convert

    return decorate


# ---- what formats share --------------------------------------------------------------------------


def value_of(row: Row, key: str) -> Any:
    """A field, or one of a nested object by a dotted key; raises BadField."""
    value: Any = row
    for part in (key,) if key in row else key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            choices = value if isinstance(value, Mapping) else ()
            raise BadField(f"no field '{key}'; {did_you_mean(part, map(str, choices))}")
        value = value[part]
    return value


def _first_of(row: Row, *keys: str) -> Any:
    """The first of these fields that the row has; a dotted key is one of a nested object."""
    for key in keys:
        try:
            return value_of(row, key)
        except BadField:
            continue
    names = " or ".join(f"'{key}'" for key in keys)
    raise BadField(f"no field {names}; {did_you_mean(keys[0], map(str, row))}")


def _text_of(row: Row, *keys: str) -> str:
    value = _first_of(row, *keys)
    if not isinstance(value, str):
        raise BadField(f"field '{keys[0]}' must be a text, is {describe(value)}")
    return value


def _rest(row: Row, *used: str) -> dict[str, Any]:
    """The row's other fields; those named as one of the schema's are put below `original`."""
    others = _without(row, *used)
    original = {key: others.pop(key) for key in RESERVED_KEYS & others.keys()}
    return {**others, "original": original} if original else others


def _without(row: Row, *keys: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in keys}


def _json_of(value: Any) -> Any:
    """What a text holds as JSON; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadAnswer(f"tests are not JSON: {error}") from error


# ---- the formats ---------------------------------------------------------------------------------

_TOOL_TAG = re.compile(r"</?(?:tool_call|response)>")


@register_format(
    "toolrl",
    answer_reward="tool_call_correctness",
    summary="ToolRL: prompt (messages), ground_truth or reward_model.ground_truth (tagged text)",
)
def toolrl(row: Row) -> dict[str, Any]:
    """Tool calling. A tag that the answer's thinking text mentions is taken out of it there."""
    answer = _text_of(row, "ground_truth", "reward_model.ground_truth")
    # Both rewards look at all of the text: a mention would be the call, or one tag too many.
    thinking, end, rest = answer.partition("</think>")
    repaired = {}
    if end and _TOOL_TAG.search(thinking):
        answer = _TOOL_TAG.sub("", thinking) + end + rest
        repaired = {"repaired": "tags in the answer's thinking text are taken out"}
    kept = _rest(row, "prompt", "ground_truth", "reward_model", "extra_info", "data_source")
    return {**kept, "prompt": _first_of(row, "prompt"), "answer": answer, **repaired}


_GSM8K_GOLD = re.compile(r"####[ \t]*(-?[0-9][0-9,]*(?:\.[0-9]+)?)[ \t]*\s*\Z")


@register_format(
    "gsm8k",
    answer_reward="gsm8k_correctness",
    summary="GSM8K: question, answer (a solution that ends in '#### N')",
)
def gsm8k(row: Row) -> dict[str, Any]:
    """GSM8K; the number is the answer, the text before it the solution."""
    solution = _text_of(row, "answer")
    gold = _GSM8K_GOLD.search(solution)
    if gold is None or solution.count("####") > 1:
        raise BadAnswer(f"answer must end in '#### N', once; it ends in {solution[-30:]!r}")
    rest = _rest(row, "question", "answer")
    return {
        **rest,
        "prompt": _text_of(row, "question"),
        "answer": gold[1],
        "solution": solution,
    }


@register_format(
    "math",
    answer_reward="math_correctness",
    summary="MATH, DeepScaleR, AIME, AMC, OlympiadBench: problem, answer; or solution with a box",
)
def math(row: Row) -> dict[str, Any]:
    """Mathematics. Without an answer, it is the last box of the solution, as in MATH."""
    solution = row.get("solution")
    solution = solution if isinstance(solution, str) and solution.strip() else None
    rest = _rest(row, "problem", "question", "answer", "solution")
    if solution is not None:
        rest["solution"] = solution
    return {
        **rest,
        "prompt": _text_of(row, "problem", "question"),
        "answer": _math_answer(row, solution),
    }


def _math_answer(row: Row, solution: str | None) -> str:
    from gdpo_megatron.rewards.builtin.math import last_boxed

    answer = row.get("answer")
    if isinstance(answer, list) and len(answer) == 1:  # OlympiadBench
        answer = answer[0]
    if answer is None and solution is not None:
        answer = last_boxed(solution)
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise BadAnswer(f"field 'answer' must be an expression, is {describe(row.get('answer'))}")
    return answer


@register_format(
    "code",
    answer_reward="code_pass_rate",
    summary="Eurus and the like: prompt, reward_model.ground_truth; or problem and tests",
)
def code(row: Row, *, unwrap_outputs: bool = False) -> dict[str, Any]:
    """Programs, tested by input and output or by calls.

    Args:
        row: with `prompt` or `problem`, and tests: an object, or JSON of one, of inputs, outputs
            and, where a function is called, fn_name.
        unwrap_outputs: the expected value of a call is a list of one, as APPS has it: take it out.
    """
    ability = row.get("ability")
    if ability not in (None, "code", "coding"):
        raise OtherTask(f"field 'ability' is {describe(ability)}, not 'code'")
    prompt = _first_of(row, "prompt", "problem", "question")
    tests = _json_of(_first_of(row, "reward_model.ground_truth", "ground_truth", "tests"))
    if not isinstance(tests, Mapping):
        raise BadAnswer(f"tests must be an object, are {describe(tests)}")
    answer = _code_tests(tests, "class Solution" in str(prompt), unwrap_outputs)
    used = ("prompt", "problem", "question", "reward_model", "ground_truth", "tests")
    return {**_rest(row, *used), "prompt": prompt, "answer": answer}


def _code_tests(tests: Row, in_class: bool, unwrap_outputs: bool) -> str:
    """The tests in the form that code rewards read."""
    name = tests.get("fn_name") or tests.get("entry_point")
    rest = _without(tests, "fn_name", "entry_point")
    if name is None:
        given, expected = tests.get("inputs"), tests.get("outputs")
        # Some sets have the lines of a text as a list.
        texts = {"inputs": _joined(given), "outputs": _joined(expected)}
        return json.dumps({**rest, **texts}, ensure_ascii=False)
    if not isinstance(name, str):
        raise BadAnswer(f"'fn_name' must be a text, is {describe(name)}")
    inputs = [_arguments(given) for given in _list(tests, "inputs")]
    outputs = [_value(expected, unwrap_outputs) for expected in _list(tests, "outputs")]
    entry = f"Solution().{name}" if in_class and "." not in name else name
    calls = {"inputs": inputs, "outputs": outputs, "entry_point": entry}
    return json.dumps({**rest, **calls}, ensure_ascii=False)


def _list(tests: Row, key: str) -> list[Any]:
    value = tests.get(key)
    if not isinstance(value, list):
        raise BadAnswer(f"'{key}' of the tests must be a list, is {describe(value)}")
    return value


def _joined(texts: Any) -> Any:
    if not isinstance(texts, list):
        return texts
    return ["\n".join(it) if _is_lines(it) else it for it in texts]


def _is_lines(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(line, str) for line in value)


def _arguments(given: Any) -> Any:
    """Arguments of a call: a list, or a text with one JSON value a line."""
    if not isinstance(given, str):
        return given
    try:
        return [json.loads(line) for line in given.split("\n")]
    except ValueError as error:
        raise BadAnswer(f"arguments {describe(given)} are not JSON, one a line: {error}") from error


def _value(expected: Any, unwrap: bool) -> Any:
    if isinstance(expected, str):
        try:
            expected = json.loads(expected)
        except ValueError as error:
            raise BadAnswer(f"value {describe(expected)} is not JSON: {error}") from error
    if unwrap:
        if not isinstance(expected, list) or len(expected) != 1:
            raise BadAnswer(f"value {describe(expected)} is no list of one to unwrap")
        return expected[0]
    return expected


@register_format(
    "humaneval",
    answer_reward="code_pass_rate",
    summary="HumanEval: prompt, test, entry_point, task_id",
)
def humaneval(row: Row) -> dict[str, Any]:
    """HumanEval. What the prompt has above the function is there when the program runs."""
    prompt, name = _text_of(row, "prompt"), _text_of(row, "entry_point")
    head, found, _ = prompt.partition(f"def {name}(")
    if not found:
        raise BadField(f"field 'prompt' has no 'def {name}('")
    try:
        ast.parse(head)
    except SyntaxError as error:
        raise BadField(f"field 'prompt', above 'def {name}(': {error}") from error
    answer = {"check": _text_of(row, "test"), "entry_point": name, "prelude": head}
    used = ("prompt", "test", "entry_point", "task_id", "canonical_solution")
    solution = row.get("canonical_solution")
    return {
        **_rest(row, *used),
        "id": _text_of(row, "task_id"),
        "prompt": prompt,
        "answer": json.dumps(answer, ensure_ascii=False),
        "solution": None if solution is None else f"{prompt}{solution}",
    }


@register_format(
    "mbpp",
    answer_reward="code_pass_rate",
    summary="MBPP: text, test_list, test_setup_code, task_id",
)
def mbpp(row: Row) -> dict[str, Any]:
    """MBPP. The tests stand in the prompt, for they alone name the function."""
    asserts = _first_of(row, "test_list")
    if not _is_lines(asserts) or not asserts:
        raise BadAnswer(f"field 'test_list' must be asserts, is {describe(asserts)}")
    tests = {"asserts": asserts, "setup": row.get("test_setup_code") or ""}
    prompt = f"{_text_of(row, 'text')}\nIt has to pass these tests:\n\n" + "\n".join(asserts)
    used = ("text", "test_list", "test_setup_code", "task_id", "code")
    return {
        **_rest(row, *used),
        "id": f"mbpp/{_first_of(row, 'task_id')}",
        "prompt": prompt,
        "problem": _text_of(row, "text"),
        "answer": json.dumps(tests, ensure_ascii=False),
        "solution": row.get("code"),
    }


@register_format("rows", summary="any: --prompt-key and --answer-key name its fields")
def rows(row: Row, *, prompt_key: str = "prompt", answer_key: str | None = "answer") -> Any:
    """Rows with a prompt and an answer.

    Args:
        row: any fields; its own `prompt_id` or `id` names it, as in a run.
        prompt_key: field of the prompt; a dotted key is a field of a nested object.
        answer_key: field of the answer; None where there is none. What is no text becomes JSON.
    """
    answer = None if answer_key is None else value_of(row, answer_key)
    if answer is not None and not isinstance(answer, str):
        try:
            answer = json.dumps(answer, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise BadAnswer(f"field '{answer_key}' cannot be written as JSON: {error}") from error
    rest = _without(row, prompt_key, answer_key or "answer")
    if "prompt_id" in rest:
        rest = {"id": rest["prompt_id"], **_without(rest, "prompt_id", "id")}
    return {**rest, "prompt": value_of(row, prompt_key), "answer": answer}
