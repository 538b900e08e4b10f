"""Overlong, repetition, regular expression, JSON schema, fenced blocks: values computed by hand.

Not covered: patterns of a schema that jsonschema itself uses to tell additional properties apart.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdpo_megatron.config.schema import RewardConfig
from gdpo_megatron.errors import InputError
from gdpo_megatron.rewards import NOT_APPLICABLE, Invalid, RewardSample, resolve_rewards
from gdpo_megatron.rewards.base import collect_events
from gdpo_megatron.rewards.builtin import json_schema
from gdpo_megatron.rewards.builtin.fenced import FencedBlock, fenced_blocks
from gdpo_megatron.rewards.builtin.json_schema import schema_reward
from gdpo_megatron.rewards.builtin.overlong import overlong, overlong_penalty
from gdpo_megatron.rewards.builtin.regex_match import regex_match, regex_reward
from gdpo_megatron.rewards.builtin.repetition import repetition, repetition_penalty

# Takes a backtracking engine longer than the age of the universe.
EVIL, VICTIM = "^(a|aa)+$", "a" * 200 + "b"


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(0, 0.0), (16, 0.0), (17, -0.25), (18, -0.5), (19, -0.75), (20, -1.0), (21, -1.0)],
)
def test_overlong(num_tokens: int, expected: float):
    # DAPO with L_max = 20 and L_cache = 4: nothing up to 16, then a quarter per token.
    assert overlong_penalty(num_tokens, limit=16, buffer=4) == expected
    sample = RewardSample(completion="", num_tokens=num_tokens, finish_reason="length")
    assert overlong(sample, limit=16, buffer=4) == expected


def test_no_penalty_is_a_positive_zero():
    assert math.copysign(1.0, overlong_penalty(3, 16, 4)) == 1.0
    assert math.copysign(1.0, repetition_penalty("a b c", 2)) == 1.0


@pytest.mark.parametrize(
    ("text", "size", "unit", "expected"),
    [
        ("", 1, "word", 0.0),
        ("a b", 3, "word", 0.0),  # shorter than one n-gram
        ("a b c", 3, "word", 0.0),
        ("a b a b a", 2, "word", -0.5),  # ab ba ab ba: 2 of 4
        ("a a a a", 1, "word", -0.75),
        ("Well  well\nWELL", 1, "word", pytest.approx(-2 / 3)),
        ("the cat. the cat", 2, "word", 0.0),  # "cat." is another word
        ("abab", 2, "character", pytest.approx(-1 / 3)),  # ab ba ab: 2 of 3
        ("abab", 2, "word", 0.0),
        ("\u54c8" * 5, 1, "character", -0.8),
        ("x " * 50_000, 3, "word", pytest.approx(1 / 49_998 - 1)),
    ],
)
def test_repetition(text: str, size: int, unit: Any, expected: float):
    assert repetition_penalty(text, size, unit=unit) == expected
    assert repetition(RewardSample(completion=text), ngram_size=size, unit=unit) == expected


@given(st.text(alphabet="ab ", max_size=60), st.integers(1, 5))
def test_saying_it_twice_is_never_better(text: str, size: int):
    once = repetition_penalty(text, size)
    assert -1.0 < once <= 0.0
    assert repetition_penalty(f"{text} {text}", size) <= once + 1e-12


@pytest.mark.parametrize(
    ("text", "pattern", "where", "expected"),
    [
        ("a dog", "d.g", "search", 1.0),
        ("a dog", "d.g", "match", 0.0),
        ("dog!", "d.g", "match", 1.0),
        ("dog!", "d.g", "fullmatch", 0.0),
        ("dog", "d.g", "fullmatch", 1.0),
        ("a\nb", "a.b", "search", 0.0),
        ("a\nb", "(?s)a.b", "search", 1.0),
        ("DOG", "(?i)dog", "search", 1.0),
        ("<t>x</t>", r"<(\w)>(?!y)x</\1>", "fullmatch", 1.0),  # lookahead, backreference
        ("", "", "search", 1.0),
    ],
)
def test_regex(text: str, pattern: str, where: Any, expected: float):
    assert regex_reward(text, pattern, where=where) == expected
    assert regex_match(RewardSample(completion=text), pattern, where=where) == expected


def test_backtracking_is_cut_off():
    with collect_events() as events:
        assert regex_reward(VICTIM, EVIL, timeout=0.05) == 0.0
        sample = RewardSample(completion=VICTIM)
        assert regex_match(sample, EVIL, timeout=0.05) == 0.0
        missing = regex_match(sample, EVIL, timeout=0.05, on_timeout="missing")
    assert missing == Invalid("regex timeout")
    assert events == {"timeout": 3}


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1}, "tags": {"uniqueItems": True}},
    "required": ["n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"n": 3}', 1.0),
        (' {"n": 3, "tags": ["a", 1, true, {"b": 1}, null]}\n', 1.0),
        ('{"n": 3.0}', 1.0),  # an integer, says the standard
        ('{"n": 3.5}', 0.0),
        ('{"n": true}', 0.0),
        ('{"n": "3"}', 0.0),
        ('{"n": 0}', 0.0),
        ("{}", 0.0),
        ('{"n": 3, "m": 1}', 0.0),
        ('{"n": 3, "tags": [1, 1.0]}', 0.0),
        ('{"n": 3, "tags": [{"a": 1, "b": 2}, {"b": 2, "a": 1}]}', 0.0),
        ('{"n": 1e400}', 0.0),
        ('{"n": NaN}', 0.0),
        ("[3]", 0.0),
        ('{"n": 3} and more', 0.0),
        ("{'n': 3}", 0.0),
        ("", 0.0),
        ('<think> {"n": 0} </think>\n{"n": 3}', 1.0),
        ('So:\n```json\n{"n": 3}\n```\nDone.', 1.0),
        ('```\n{"n": 3}\n```', 1.0),
        ('```python\nx = 1\n```\n\n```json\n{"n": 3}\n```', 1.0),
        ('```json\n{"n": 3}\n```\n```json\n{"n": 0}\n```', 0.0),  # the last one counts
        ('```json\n{"n": 3}\n```\n```python\nx\n```', 1.0),
        ('```json\n{"n": 3}', 0.0),  # not closed
        ("[" * 100_000, 0.0),
        ('{"a":' * 100_000, 0.0),
        ('{"n": ' + "9" * 100_000 + "}", 0.0),
        ('{"n": 3, "tags": [' + ",".join(f'{{"a": {i}}}' for i in range(30_000)) + "]}", 1.0),
        ('{"n": "\\ud800"}', 0.0),
    ],
)
def test_json_schema(text: str, expected: float):
    assert schema_reward(text, SCHEMA) == expected


def test_json_schema_in_a_tag():
    text = '<out>{"n": 0}</out> <out>{"n": 3}</out>'
    assert schema_reward(text, SCHEMA, tag="out") == 1.0
    assert schema_reward(text, SCHEMA, tag="in") == 0.0
    assert schema_reward('{"n": 3}', SCHEMA, tag="out") == 0.0
    assert schema_reward('<out>{"n": 3}', SCHEMA, tag="out") == 0.0


def test_json_schema_counts_what_is_no_json():
    with collect_events() as events:
        schema_reward("nothing", SCHEMA)
        schema_reward("{}", SCHEMA)
    assert events == {"no_json": 1}


def test_json_schema_references():
    schema = {"$defs": {"positive": {"minimum": 1}}, "items": {"$ref": "#/$defs/positive"}}
    assert (schema_reward("[1, 2]", schema), schema_reward("[0]", schema)) == (1.0, 0.0)
    recursive = {"properties": {"next": {"$ref": "#"}}, "required": ["v"]}
    assert schema_reward('{"v": 1, "next": {"v": 2}}', recursive) == 1.0
    assert schema_reward('{"v": 1, "next": {}}', recursive) == 0.0
    for depth, expected in ((64, 1.0), (65, 0.0)):
        text = "[" * depth + "]" * depth
        assert schema_reward(text, {"items": {"allOf": [{"$ref": "#"}]}}) == expected


def test_json_schema_patterns_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(json_schema, "PATTERN_SECONDS", 0.05)
    by_pattern = {"pattern": EVIL}
    by_name = {"patternProperties": {EVIL: {"type": "integer"}}}
    with collect_events() as events:
        assert schema_reward(json.dumps(VICTIM), by_pattern) == 0.0
        assert schema_reward(json.dumps({VICTIM: 1}), by_name) == 0.0
    assert events == {"timeout": 2}
    assert (schema_reward('"aa"', by_pattern), schema_reward('"b"', by_pattern)) == (1.0, 0.0)
    assert (schema_reward('{"aa": 1}', by_name), schema_reward('{"aa": ""}', by_name)) == (1.0, 0.0)


def test_the_schema_may_be_the_answer():
    sample = RewardSample(completion='{"n": 3}', answer=json.dumps(SCHEMA))
    assert json_schema.json_schema_answer(sample) == 1.0
    assert json_schema.json_schema(sample, schema=SCHEMA) == 1.0
    assert json_schema.json_schema_answer(RewardSample(completion="{}")) is NOT_APPLICABLE


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("{", "no JSON"),
        ("3", "a JSON Schema is an object, not 3"),
        ('{"type": "objekt"}', "no JSON Schema: .* \\(at type"),
        ('{"pattern": "("}', "no JSON Schema: .* \\(at pattern"),
        ('{"$ref": "http://example.com/schema"}', "is not in the schema"),
        ('{"items": {"$ref": "#/$defs/absent"}}', "is not in the schema"),
    ],
)
def test_bad_schemas_are_refused(answer: str, reason: str):
    with pytest.raises(ValueError, match=reason):
        json_schema.check_schema_text(answer)


@given(st.text(max_size=100))
def test_any_text_has_a_score(text: str):
    assert schema_reward(text, SCHEMA) in (0.0, 1.0)
    assert schema_reward(text, SCHEMA, tag="a") in (0.0, 1.0)
    assert regex_reward(text, r"^\w+$") in (0.0, 1.0)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
def test_all_json_is_valid_under_true(value: Any):
    assert schema_reward(f"```json\n{json.dumps(value)}\n```", True) == 1.0
    assert schema_reward(f"```json\n{json.dumps(value)}\n```", False) == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```python\nx\n```", [("python", "x\n")]),
        ("```\n```", [("", "")]),
        ("a\n```Python title=1\nx\ny\n```\nb", [("python", "x\ny\n")]),
        ("```a\nx\n```\n```b\ny\n```", [("a", "x\n"), ("b", "y\n")]),
        ("````md\n```\nx\n```\n````", [("md", "```\nx\n```\n")]),
        ("~~~\n```\n~~~", [("", "```\n")]),
        ("```a\nx\n```b\n```", [("a", "x\n```b\n")]),  # a fence that closes has no language
        ("text ```x``` text", []),
        ("    ```\nx\n    ```", []),  # indented code
        ("```a\nx", []),
        ("```\n" * 20_001, [("", "")] * 10_000),
    ],
)
def test_fenced_blocks(text: str, expected: list[tuple[str, str]]):
    assert fenced_blocks(text) == [FencedBlock(*block) for block in expected]


@pytest.mark.parametrize(
    ("type", "args", "message"),
    [
        ("overlong", {"limit": 5}, "args.buffer is missing"),
        ("overlong", {"limit": 5, "buffer": 0}, "args.buffer is 0: Input should be greater than 0"),
        ("overlong", {"limit": 5.5, "buffer": 1}, "args.limit is 5.5: Input should be a valid int"),
        ("repetition", {"ngram_size": 0}, "args.ngram_size is 0: Input should be greater than or"),
        ("repetition", {"ngram_size": 101}, "args.ngram_size is 101: Input should be less than"),
        ("repetition", {"ngram_size": 2, "unit": "token"}, "Input should be 'word' or 'character'"),
        ("regex", {"pattern": "("}, "args.pattern is '(': Value error, no regular expression"),
        ("regex", {"pattern": "a", "where": "start"}, "Input should be 'search', 'match' or"),
        ("regex", {"pattern": "a", "timeout": 0}, "args.timeout is 0: Input should be greater"),
        ("json_schema", {}, "args.schema is missing"),
        ("json_schema", {"schema": {"type": "objekt"}}, "Value error, no JSON Schema: 'objekt'"),
        ("json_schema", {"schema": {"$ref": "http://x/y"}}, "'http://x/y' is not in the schema"),
        ("json_schema", {"schema": {}, "tag": "<a>"}, "args.tag is '<a>': String should match"),
        ("math_correctness", {"timeout": -1}, "args.timeout is -1: Input should be greater than 0"),
        ("math_correctness", {"on_timeout": "one"}, "Input should be 'zero' or 'missing'"),
        ("math_correctness", {"timeout": float("inf")}, "Input should be a finite number"),
        ("tool_call_correctness", {"mode": "papers"}, "Input should be 'reference' or 'paper'"),
        ("tool_call_correctness", {"name_overlap": 1}, "Input should be 'multiset' or 'set'"),
        ("gsm8k_correctness", {"normalised": True}, "did you mean 'normalized'?"),
        ("gsm8k_integer", {"normalized": "maybe"}, "Input should be a valid boolean"),
        ("length", {"limit": 3, "count_stop_token": "x"}, "Input should be a valid boolean"),
    ],
)
def test_wrong_arguments_fail_before_the_run(type: str, args: dict[str, Any], message: str):
    with pytest.raises(InputError) as error:
        resolve_rewards([RewardConfig(name="r", type=type, args=args)])
    (problem,) = error.value.problems
    assert message in problem and "\n" not in problem
