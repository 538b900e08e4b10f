"""The tests of a code problem: what a row's answer says, and how each test is taken.

The answer is a JSON object in one of four forms (docs/rewards.md has examples):

    {"inputs": [text, ...], "outputs": [text, ...]}                       stdin to stdout
    {"inputs": [[argument, ...], ...], "outputs": [value, ...], "entry_point": "f"}   calls
    {"asserts": [code, ...]}                                              as MBPP has them
    {"check": code, "entry_point": "f"}                                   as HumanEval has it

and may hold "prelude" and "setup" (code that runs before and after the program, in its module),
"time_limit_seconds" and "memory_limit_mb" (used where they are below the sandbox's own).
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from gdpo_megatron.errors import did_you_mean
from gdpo_megatron.rewards.builtin.code_asserts import split_asserts, split_check
from gdpo_megatron.sandbox import NO_VALUE, Execution, Limits, Sandbox, Status

_FORMS: tuple[tuple[str, ...], ...] = (
    ("inputs", "outputs"),
    ("inputs", "outputs", "entry_point"),
    ("asserts",),
    ("check", "entry_point"),
)
_COMMON = ("prelude", "setup", "time_limit_seconds", "memory_limit_mb")


@dataclass(frozen=True, slots=True)
class CodeTest:
    """One test.

    Args:
        run: (sandbox, program, limits) -> what came of it.
        passed: of a run that ended well.
        inside: the verdict is taken inside the sandbox.
    """

    run: Callable[[Sandbox, str, Limits], Execution]
    passed: Callable[[Execution], bool]
    inside: bool = False


@dataclass(frozen=True, slots=True)
class CodeTests:
    """All tests of a problem.

    Args:
        tests: at least one.
        time_limit_seconds: CPU time of one test, rounded up; None: the sandbox's.
        memory_limit_mb: None: the sandbox's.
    """

    tests: tuple[CodeTest, ...]
    time_limit_seconds: int | None
    memory_limit_mb: int | None

    def limits(self, most: Limits) -> Limits:
        """Limits of a test, none above `most`."""
        cpu = min(most.cpu_seconds, self.time_limit_seconds or most.cpu_seconds)
        memory = most.memory_bytes
        if self.memory_limit_mb is not None:
            memory = min(memory, self.memory_limit_mb << 20)
        return replace(most, cpu_seconds=cpu, memory_bytes=memory)


def parse_tests(text: str, *, float_tolerance: float = 0.0) -> CodeTests:
    """Read a row's answer.

    Args:
        text: the JSON object.
        float_tolerance: relative and absolute, for numbers in what is compared; 0: exactly equal.

    Raises:
        ValueError: what is wrong with it.
    """
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"tests are not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"tests are a JSON {type(row).__name__}, not an object")
    fields = cast("dict[str, Any]", row)
    form = _form_of(fields)
    tests = tuple(_READERS[form](fields, float_tolerance))
    if not tests:
        raise ValueError(f"'{form[0]}' is empty: a problem needs at least one test")
    seconds = _number(fields, "time_limit_seconds")
    memory = _number(fields, "memory_limit_mb")
    return CodeTests(
        tests,
        None if seconds is None else math.ceil(seconds),
        None if memory is None else math.ceil(memory),
    )


def same_value(value: Any, expected: Any, tolerance: float) -> bool:
    """Whether a value is the expected one; with a tolerance, also where numbers in it are close."""
    if not tolerance:
        return bool(value == expected)
    if isinstance(value, int | float) and isinstance(expected, int | float):
        try:
            close = math.isclose(value, expected, rel_tol=tolerance, abs_tol=tolerance)
        except OverflowError:  # an int beyond floats
            close = False
        return close or value == expected
    if isinstance(expected, list | tuple) and isinstance(value, type(expected)):
        pairs = list(zip(value, expected, strict=False))
        return len(value) == len(expected) and all(same_value(a, b, tolerance) for a, b in pairs)
    if isinstance(expected, dict) and isinstance(value, dict):
        return value.keys() == expected.keys() and all(
            same_value(value[key], expected[key], tolerance) for key in expected
        )
    return bool(value == expected)


def same_output(output: str, expected: str, tolerance: float) -> bool:
    """Whether two outputs agree line by line, whitespace at line ends and empty ends aside.

    With a tolerance, lines also agree whose words do, where words that are numbers are compared as
    such.
    """
    lines = [line.strip() for line in output.strip().splitlines()]
    wanted = [line.strip() for line in expected.strip().splitlines()]
    return len(lines) == len(wanted) and all(
        line == want or (tolerance > 0 and _same_words(line.split(), want.split(), tolerance))
        for line, want in zip(lines, wanted, strict=True)
    )


def _same_words(words: list[str], wanted: list[str], tolerance: float) -> bool:
    def same(word: str, want: str) -> bool:
        try:
            return same_value(float(word), float(want), tolerance)
        except ValueError:
            return word == want

    return len(words) == len(wanted) and all(map(same, words, wanted))


# ---- the forms -----------------------------------------------------------------------------------


def _form_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    own = set(row) - set(_COMMON)
    for form in _FORMS:
        if own == set(form):
            return form
    known = [*dict.fromkeys(key for form in _FORMS for key in form), *_COMMON]
    for key in sorted(own - set(known)):
        raise ValueError(f"tests have an unknown field '{key}'; {did_you_mean(key, known)}")
    forms = "; ".join(" + ".join(form) for form in _FORMS)
    raise ValueError(f"tests have the fields {sorted(own)}; choices: {forms}")


def _stdin_tests(row: Mapping[str, Any], tolerance: float) -> Iterator[CodeTest]:
    for given, expected in _pairs(row):
        if not isinstance(given, str) or not isinstance(expected, str):
            raise ValueError("'inputs' and 'outputs' without 'entry_point' hold strings")
        yield CodeTest(partial(_run_stdin, given), partial(_output_is, expected, tolerance))


def _run_stdin(given: str, sandbox: Sandbox, program: str, limits: Limits) -> Execution:
    return sandbox.run(program, stdin=given, limits=limits)


def _output_is(expected: str, tolerance: float, done: Execution) -> bool:
    return same_output(done.stdout, expected, tolerance)


def _call_tests(row: Mapping[str, Any], tolerance: float) -> Iterator[CodeTest]:
    entry_point = _entry_point(row)
    for given, expected in _pairs(row):
        if not isinstance(given, list):
            raise ValueError("'inputs' with 'entry_point' holds lists of arguments")
        expression = f"{entry_point}({', '.join(map(repr, cast('list[Any]', given)))})"
        yield CodeTest(_caller(row, expression), partial(_value_is, expected, tolerance))


def _value_is(expected: Any, tolerance: float, done: Execution) -> bool:
    value = done.value
    if isinstance(value, tuple) and isinstance(expected, list):
        value = list(cast("tuple[Any, ...]", value))  # JSON has no tuples
    return value is not NO_VALUE and same_value(value, expected, tolerance)


def _assert_tests(row: Mapping[str, Any], tolerance: float) -> Iterator[CodeTest]:
    asserts = row["asserts"]
    if not isinstance(asserts, list) or not all(
        isinstance(code, str) for code in cast("list[Any]", asserts)
    ):
        raise ValueError("'asserts' is a list of strings")
    for code in cast("list[str]", asserts):
        splits = split_asserts(code)
        if splits is None:
            yield _inside(row, code)
        else:
            for split in splits:
                yield CodeTest(_caller(row, split.expression), partial(_holds, split))


def _check_tests(row: Mapping[str, Any], tolerance: float) -> Iterator[CodeTest]:
    entry_point, code = _entry_point(row), row["check"]
    if not isinstance(code, str):
        raise ValueError("'check' is code, as a string")
    splits = split_check(code, entry_point)
    if splits is None:
        yield _inside(row, f"{code}\ncheck({entry_point})\n")
    else:
        for split in splits:
            yield CodeTest(_caller(row, split.expression), partial(_holds, split))


def _holds(split: Any, done: Execution) -> bool:
    return done.value is not NO_VALUE and split.holds(done.value)


def _caller(row: Mapping[str, Any], expression: str) -> Callable[[Sandbox, str, Limits], Execution]:
    around = _around(row)
    return lambda sandbox, program, limits: sandbox.run_call(
        program, expression, limits=limits, **around
    )


def _inside(row: Mapping[str, Any], code: str) -> CodeTest:
    around = _around(row)
    return CodeTest(
        lambda sandbox, program, limits: sandbox.run_check(program, code, limits=limits, **around),
        lambda done: done.value is True,
        inside=True,
    )


def _around(row: Mapping[str, Any]) -> dict[str, str]:
    around: dict[str, str] = {}
    for key in ("prelude", "setup"):
        code = row.get(key) or ""
        if not isinstance(code, str):
            raise ValueError(f"'{key}' is code, as a string")
        try:
            ast.parse(code)
        except SyntaxError as error:
            raise ValueError(f"'{key}' is not Python: {error}") from error
        around[key] = code
    return around


def _pairs(row: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    given, expected = row["inputs"], row["outputs"]
    if not isinstance(given, list) or not isinstance(expected, list):
        raise ValueError("'inputs' and 'outputs' are lists")
    if len(given) != len(expected):
        raise ValueError(f"'inputs' has {len(given)} entries, 'outputs' {len(expected)}")
    yield from zip(cast("list[Any]", given), cast("list[Any]", expected), strict=True)


def _entry_point(row: Mapping[str, Any]) -> str:
    name = row["entry_point"]
    try:
        ast.parse(name, mode="eval")
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"'entry_point' is {name!r}; it names a function") from error
    return name


def _number(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise ValueError(f"'{key}' is {value!r}; it is a positive number")
    return value


_READERS: dict[tuple[str, ...], Callable[[Mapping[str, Any], float], Iterator[CodeTest]]] = {
    _FORMS[0]: _stdin_tests,
    _FORMS[1]: _call_tests,
    _FORMS[2]: _assert_tests,
    _FORMS[3]: _check_tests,
}


def is_fatal(status: Status) -> bool:
    """Whether no other test of the program can end differently."""
    return status is Status.COMPILE_ERROR
