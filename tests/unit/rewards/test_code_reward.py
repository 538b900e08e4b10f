"""The code rewards without a sandbox: which program, which tests, which verdict.

A fake sandbox answers with prepared executions, so every row of the table of decisions is seen, the
sandbox's own failure included. Real programs are run in tests/security.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from gdpo_megatron.config.sandbox import SandboxConfig
from gdpo_megatron.rewards import NOT_APPLICABLE, REWARDS, Invalid, RewardFn, RewardSample
from gdpo_megatron.rewards.base import collect_events
from gdpo_megatron.rewards.builtin import code
from gdpo_megatron.rewards.builtin.code_asserts import split_asserts, split_check
from gdpo_megatron.rewards.builtin.code_tests import parse_tests, same_output, same_value
from gdpo_megatron.sandbox import Execution, Limits, Status, is_sandbox_user

LIMITS = Limits.of(SandboxConfig())


class FakeSandbox:
    """Answers each run by the prepared function of (kind, what was asked)."""

    def __init__(self, reply: Callable[[str, str], Execution]):
        self.limits = LIMITS
        self.reply = reply
        self.asked: list[tuple[str, str, Limits]] = []

    def run(self, program: str, *, stdin: str, limits: Limits) -> Execution:
        return self._answer("stdin", stdin, limits)

    def run_call(self, program: str, expression: str, *, limits: Limits, **around: str):
        return self._answer("call", expression, limits)

    def run_check(self, program: str, check: str, *, limits: Limits, **around: str):
        return self._answer("check", check, limits)

    def _answer(self, kind: str, what: str, limits: Limits) -> Execution:
        self.asked.append((kind, what, limits))
        return self.reply(kind, what)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeSandbox]]:
    def make(reply: Callable[[str, str], Execution]) -> FakeSandbox:
        sandbox = FakeSandbox(reply)
        monkeypatch.setattr(code, "shared_sandbox", lambda: sandbox)
        code._memory.clear()
        return sandbox

    yield make
    code._memory.clear()


def block(program: str = "x = 1") -> str:
    return f"Here:\n```python\n{program}\n```\n"


def stdin_tests(*outputs: str, **more: Any) -> str:
    inputs = [str(number) for number in range(len(outputs))]
    return json.dumps({"inputs": inputs, "outputs": list(outputs), **more})


# ---- which program -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("```python\na\n```", "a\n"),
        ("```\na\n```", "a\n"),
        ("```py\na\n```\n```Python3\nb\n```", "b\n"),
        ("```python\na\n```\nprints\n```text\nb\n```", "a\n"),
        ("```python\na\n```\n```python\nb", "a\n"),  # the last one is not closed
        ("````python\n```\na\n````", "```\na\n"),
        ("  ```python\n  a\n  ```", "  a\n"),
        ("```python\r\na\r\n```", "a\n"),
        ("```python\n```", "\n"),
        ("no code", None),
        ("```python\na", None),
        ("```cpp\na\n```", None),
        ("`a`", None),
        ("", None),
    ],
)
def test_program_is_the_last_closed_block(completion: str, program: str | None):
    assert code.extract_program(completion) == program


# ---- verdicts ------------------------------------------------------------------------------------

OK = Execution(status=Status.OK, stdout="yes\n")


def status(value: Status) -> Execution:
    return Execution(status=value, detail="gone")


@pytest.mark.parametrize(
    ("second", "rate", "bug", "events"),
    [
        (OK, 1.0, 1.0, {}),
        (Execution(status=Status.OK, stdout="no"), 0.5, 1.0, {}),
        (status(Status.RUNTIME_ERROR), 0.5, 0.0, {"runtime_error": 1}),
        (status(Status.TIMEOUT), 0.5, 0.0, {"timeout": 1}),
        (status(Status.MEMORY), 0.5, 0.0, {"memory": 1}),
        (status(Status.OUTPUT_LIMIT), 0.5, 0.0, {"output_limit": 1}),
        (status(Status.DENIED), 0.5, 0.0, {"denied": 1}),
    ],
)
def test_decisions(fake, second: Execution, rate: float, bug: float, events: dict[str, int]):
    sandbox = fake(lambda kind, what: OK if what == "0" else second)
    tests = stdin_tests("yes", "yes")
    with collect_events() as seen:
        assert code.pass_rate(block(), tests) == rate
    assert seen == events
    assert code.bug_free(block(), tests) == bug
    assert len(sandbox.asked) == 2  # both rewards share the runs


def test_no_code_block(fake):
    sandbox = fake(lambda kind, what: OK)
    with collect_events() as seen:
        assert code.pass_rate("I cannot", stdin_tests("yes")) == 0.0
        assert code.bug_free("I cannot", stdin_tests("yes")) == 0.0
    assert seen == {"no_code": 2}
    assert sandbox.asked == []


def test_compile_error_ends_it(fake):
    sandbox = fake(lambda kind, what: status(Status.COMPILE_ERROR))
    with collect_events() as seen:
        assert code.pass_rate(block("def"), stdin_tests("yes", "yes", "yes")) == 0.0
    assert seen == {"compile_error": 1}
    assert len(sandbox.asked) == 1


def test_failed_sandbox_is_no_score(fake):
    sandbox = fake(lambda kind, what: OK if what == "0" else status(Status.INFRA_ERROR))
    tests = stdin_tests("yes", "yes")
    for reward in (code.pass_rate, code.bug_free):
        with collect_events() as seen:
            assert reward(block(), tests) == Invalid("sandbox", "gone")
        assert seen == {"infra_error": 1}
    assert len(sandbox.asked) == 4  # and it is not remembered


def test_timeouts_are_bounded(fake):
    sandbox = fake(lambda kind, what: status(Status.TIMEOUT) if int(what) else OK)
    tests = stdin_tests(*["yes"] * 10)
    assert code.pass_rate(block(), tests) == 0.1
    assert len(sandbox.asked) == 3
    assert code.pass_rate(block(), tests, max_timeouts=5) == 0.1
    assert len(sandbox.asked) == 3 + 6


def test_unsafe_and_inside_are_counted(fake):
    done = Execution(status=Status.OK, value=True, isolation="unsafe")
    fake(lambda kind, what: done)
    tests = json.dumps({"asserts": ["for i in range(3):\n    assert f(i)"]})
    with collect_events() as seen:
        assert code.pass_rate(block(), tests) == 1.0
    assert seen == {"unsafe": 1, "verdict_inside": 1}


def test_chosen_tests_are_the_same_for_all(fake):
    sandbox = fake(lambda kind, what: OK)
    tests = stdin_tests(*["yes"] * 20)
    for program in ("a = 1", "b = 2"):
        assert code.pass_rate(block(program), tests, max_tests=4) == 1.0
    asked = [what for _, what, _ in sandbox.asked]
    assert len(set(asked[:4])) == 4
    assert asked[:4] == asked[4:]


def test_limits_of_a_problem(fake):
    sandbox = fake(lambda kind, what: OK)
    code.pass_rate(block(), stdin_tests("yes", time_limit_seconds=1.5, memory_limit_mb=64))
    code.pass_rate(block(), stdin_tests("yes", time_limit_seconds=99, memory_limit_mb=9999))
    (first, second) = [limits for _, _, limits in sandbox.asked]
    assert (first.cpu_seconds, first.memory_bytes) == (2, 64 << 20)
    assert second == LIMITS  # never above the configured ones


def test_registered(monkeypatch: pytest.MonkeyPatch):
    for name in ("code_pass_rate", "code_bug_free"):
        function = REWARDS.get(name)
        assert is_sandbox_user(function)
        assert RewardFn.of(function).check_answer is code.validate_tests
        assert function(RewardSample(completion="x", answer=None)) is NOT_APPLICABLE
    config = SandboxConfig(refuse_inside_verdicts=True)
    monkeypatch.setattr(code, "shared_config", lambda: config)
    code.validate_tests(json.dumps({"asserts": ["assert f(1) == 1"]}))
    with pytest.raises(ValueError, match="1 of 2 tests can only be judged inside"):
        code.validate_tests(json.dumps({"asserts": ["assert f(1) == 1", "x = 1\nassert x == f"]}))


# ---- tests of a row ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{", "not JSON"),
        ("[]", "a JSON list, not an object"),
        ({}, "choices: inputs \\+ outputs"),
        ({"input": [], "outputs": []}, "unknown field 'input'; did you mean 'inputs'"),
        ({"inputs": [], "outputs": []}, "'inputs' is empty"),
        ({"inputs": ["a"], "outputs": []}, "'inputs' has 1 entries, 'outputs' 0"),
        ({"inputs": [[1]], "outputs": [1]}, "hold strings"),
        ({"inputs": [1], "outputs": [1], "entry_point": "f"}, "lists of arguments"),
        ({"inputs": [[1]], "outputs": [1], "entry_point": "f("}, "'entry_point' is 'f\\('"),
        ({"asserts": "assert 1"}, "list of strings"),
        ({"asserts": ["x ="]}, "not Python"),
        ({"asserts": [""]}, "nothing is asserted"),
        ({"check": "x = 1", "entry_point": "f"}, "check\\(candidate\\)"),
        ({"asserts": ["assert f(1)"], "setup": "def"}, "'setup' is not Python"),
        ({"asserts": ["assert f(1)"], "time_limit_seconds": 0}, "positive number"),
    ],
)
def test_bad_tests_are_named(row: Any, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        parse_tests(row if isinstance(row, str) else json.dumps(row))


@pytest.mark.parametrize(
    ("value", "expected", "tolerance", "same"),
    [
        (1, 1.0, 0.0, True),
        (0.1 + 0.2, 0.3, 0.0, False),
        (0.1 + 0.2, 0.3, 1e-9, True),
        ([1.0, (2.0,)], [1.0, (2.0 + 1e-12,)], 1e-9, True),
        ([1.0], [1.0, 2.0], 1e-9, False),
        ({"a": 1.0}, {"a": 1.0 + 1e-12}, 1e-9, True),
        ({"a": 1.0}, {"b": 1.0}, 1e-9, False),
        (10**400, 1.0, 1e-9, False),
        ("a", "a", 1e-9, True),
        (None, 0.0, 1e-9, False),
    ],
)
def test_same_value(value: Any, expected: Any, tolerance: float, same: bool):
    assert same_value(value, expected, tolerance) is same


@pytest.mark.parametrize(
    ("output", "expected", "tolerance", "same"),
    [
        ("1\n2\n", "1\n2", 0.0, True),
        (" 1 \n2\n\n", "1\n2", 0.0, True),
        ("1 2", "1\n2", 0.0, False),
        ("1  2", "1 2", 0.0, False),
        ("0.30000000004", "0.3", 0.0, False),
        ("a 0.30000000004", "a 0.3", 1e-6, True),
        ("a 0.31", "a 0.3", 1e-6, False),
        ("b 0.3", "a 0.3", 1e-6, False),
        ("nan", "0.3", 1e-6, False),
        ("", "0", 0.0, False),
    ],
)
def test_same_output(output: str, expected: str, tolerance: float, same: bool):
    assert same_output(output, expected, tolerance) is same


# ---- asserts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "inside", "values", "holds"),
    [
        ("assert f(1) == 2", "(f(1),)", (2,), True),
        ("assert f(1) == 2", "(f(1),)", (3,), False),
        ("assert 2 == f(1)", "(f(1),)", (2,), True),
        ("assert f(1)", "(f(1),)", (1,), True),
        ("assert not f(1)", "(f(1),)", (0,), True),
        ("assert f(1) is None", "(f(1),)", (None,), True),
        ("assert f(1) != 2 and f(2) in (3, 4)", "(f(1), f(2))", (1, 4), True),
        ("assert abs(f(2) - 1.41) < 0.01", "(f(2),)", (1.4142,), True),
        ("assert abs(f(2) - 1.41) < 0.01", "(f(2),)", (2.0,), False),
        ("assert set(f([1])) == set([1])", "(f([1]),)", ([1, 1],), True),
        ("assert math.isclose(f(1), 0.3, rel_tol=0.01)", "(f(1),)", (0.301,), True),
        (
            "assert f(1) == {'a': [1, (2,)], -1: None}",
            "(f(1),)",
            ({"a": [1, (2,)], -1: None},),
            True,
        ),
        ("assert 0 < f(1) < 3 < f(2)", "(f(1), f(2))", (1, 4), True),
        ("assert f(1) == (2,), 'why'", "(f(1),)", ((2,),), True),
        ("assert sum(1, 2) == 3", "(sum(1, 2),)", (3,), True),  # the program's own sum
        ("assert f(g(1)) == h(1)", "(f(g(1)), h(1))", (1, 1), True),
        # What a program may answer without getting further.
        ("assert len(f(1)) == 2", "(f(1),)", (5,), False),
        ("assert f(1) * 2 == 4", "(f(1),)", ("ab",), False),
        ("assert f(1) * 2 == 4", "(f(1),)", (1 << 10**6,), False),
        ("assert f(1) / 0 == 4", "(f(1),)", (1,), False),
        ("assert sorted(f(1)) == [1]", "(f(1),)", ([1, "a"],), False),
        ("assert float(f(1)) == 1", "(f(1),)", ("x",), False),
        ("assert f(1) == 2", "(f(1),)", (), False),
        ("assert f(1) == 2", "(f(1),)", None, False),
    ],
)
def test_assert_in_two_parts(source: str, inside: str, values: Any, holds: bool):
    splits = split_asserts(source)
    assert splits is not None
    (split,) = splits
    assert split.expression == inside
    assert split.holds(values) is holds


@pytest.mark.parametrize(
    "source",
    [
        "x = 1\nassert f(x) == 1",
        "for i in range(3):\n    assert f(i)",
        "assert x == 1",
        "assert [f(i) for i in (1, 2)] == [1, 2]",
        "assert f(1) ** 2 == 4",
        "assert f(1)[0] == 4",
        "assert f(1).real == 4",
        "assert {**f(1)} == {}",
        "assert max(*f(1)) == 1",
        "assert (lambda: 1) == f(1)",
        "assert ~f(1) == 1",
    ],
)
def test_assert_that_stays_inside(source: str):
    assert split_asserts(source) is None


def test_check_with_a_candidate():
    source = (
        "METADATA = {}\n"
        "def check(candidate):\n"
        "    'Doc.'\n"
        "    assert True, 'always'\n"
        "    assert candidate([1], 2) == 3, 'first'\n"
        "    assert abs(candidate(4) - 1) < 1e-6\n"
    )
    splits = split_check(source, "Solution().solve")
    assert splits is not None
    assert [split.expression for split in splits] == [
        "(Solution().solve([1], 2),)",
        "(Solution().solve(4),)",
    ]
    assert split_check(source + "    for i in (1,): assert candidate(i)\n", "f") is None


def test_memory_of_verdicts_is_bounded(fake):
    fake(lambda kind, what: OK)
    for number in range(code._MAX_REMEMBERED + 50):
        code.pass_rate(block(f"x = {number}"), stdin_tests("yes"))
    assert len(code._memory) == code._MAX_REMEMBERED


def test_error_of_the_sandbox_is_raised_to_all(monkeypatch: pytest.MonkeyPatch):
    def unavailable() -> SimpleNamespace:
        raise RuntimeError("no sandbox")

    monkeypatch.setattr(code, "shared_sandbox", unavailable)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no sandbox"):
            code.pass_rate(block("unavailable = 1"), stdin_tests("yes"))
