"""Code: the share of tests that a program passes, and whether it runs without an error.

The paper's symbols (Table 5): pass rate in [0, 1]; bug 1 iff the program runs without compile or
runtime error. What it leaves open is decided here:

    situation                        pass_rate       bug_free   event counted
    no code block                    0               0          no_code
    syntax error                     0               0          compile_error
    exception, exit code not 0       the test fails  0          runtime_error
    CPU or wall clock used up        the test fails  0          timeout
    memory used up                   the test fails  0          memory
    printed too much                 the test fails  0          output_limit
    failed on a forbidden call       the test fails  0          denied
    wrong output, clean exit         the test fails  1          -
    the sandbox failed, repeatedly   invalid         invalid    infra_error

The program is the last fenced block that is marked python, py, python3 or not at all; a block that
is not closed is none. It runs in the sandbox, once for each test, and both rewards of a completion
share these runs.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from gdpo_megatron.config.sandbox import SandboxConfig
from gdpo_megatron.config.section import NonNegativeFloat, PositiveInt
from gdpo_megatron.rewards.base import (
    NOT_APPLICABLE,
    RewardResult,
    RewardSample,
    count_event,
    invalid,
    register_reward,
)
from gdpo_megatron.rewards.builtin.code_tests import CodeTest, CodeTests, is_fatal, parse_tests
from gdpo_megatron.sandbox import (
    NUM_TRIES,
    Status,
    shared_config,
    shared_sandbox,
    uses_sandbox,
)

_LANGUAGES = ("", "python", "py", "python3")
_FENCE = re.compile(r"[ \t]*(```+)[ \t]*([\w+-]*)[ \t]*")
_MAX_REMEMBERED = 256


@dataclass(frozen=True, slots=True)
class _Judged:
    """What all tests of a program said.

    Args:
        num_tests: tests that count.
        num_passed: of these.
        events: names of what happened in at least one of them.
        fault: of the sandbox; then there is no verdict.
    """

    num_tests: int
    num_passed: int
    events: frozenset[str]
    fault: str = ""


def pass_rate(
    completion: str,
    tests: str,
    *,
    max_tests: int | None = None,
    max_timeouts: int = 2,
    float_tolerance: float = 0.0,
) -> RewardResult:
    """Passed tests / tests of the program in a completion, in [0, 1].

    Args:
        completion: with the program in a fenced block.
        tests: JSON; see code_tests.py.
        max_tests: run only so many, the same ones for every completion of the problem.
        max_timeouts: after so many tests that timed out, or as much time as they may take, the
            rest count as failed without a run.
        float_tolerance: relative and absolute, for numbers in outputs and values.

    Returns:
        The share, or `invalid("sandbox")`.

    Raises:
        ValueError: the tests cannot be read; SandboxUnavailable: there is no sandbox.
    """
    judged = _judge(completion, tests, max_tests, max_timeouts, float_tolerance)
    return _score(judged, judged.num_passed / judged.num_tests)


def bug_free(
    completion: str,
    tests: str,
    *,
    max_tests: int | None = None,
    max_timeouts: int = 2,
    float_tolerance: float = 0.0,
) -> RewardResult:
    """1.0 if the program of a completion ran all its tests without an error, right or wrong.

    Arguments, returns and raises as for `pass_rate`.
    """
    judged = _judge(completion, tests, max_tests, max_timeouts, float_tolerance)
    return _score(judged, float(judged.events.isdisjoint(_BUGS)))


def extract_program(completion: str) -> str | None:
    """The program: the last closed fenced block of Python, or of no named language."""
    program: str | None = None
    fence, language, block = "", "", list[str]()
    for line in completion.splitlines():
        marked = _FENCE.fullmatch(line)
        if not fence and marked:
            fence, language, block = marked[1], marked[2].lower(), []
        elif fence and marked and len(marked[1]) >= len(fence) and not marked[2]:
            if language in _LANGUAGES:
                program = "\n".join(block) + "\n"
            fence = ""
        else:
            block.append(line)
    return program


def validate_tests(text: str) -> None:
    """Check, when data is loaded, that a row's tests can be run; raises ValueError if not."""
    problem = parse_tests(text)
    num_inside = sum(test.inside for test in problem.tests)
    if num_inside and shared_config().refuse_inside_verdicts:
        raise ValueError(
            f"{num_inside} of {len(problem.tests)} tests can only be judged inside the sandbox, "
            "which sandbox.refuse_inside_verdicts forbids; rewrite them as `assert f(...) == ...`"
        )


# ---- judging -------------------------------------------------------------------------------------

_BUGS = frozenset({"no_code", *Status} - {Status.OK, Status.INFRA_ERROR})


def _score(judged: _Judged, score: float) -> RewardResult:
    for event in sorted(judged.events):
        count_event(event)
    return invalid("sandbox", judged.fault) if judged.fault else score


def _judge(
    completion: str, text: str, max_tests: int | None, max_timeouts: int, tolerance: float
) -> _Judged:
    problem = parse_tests(text, float_tolerance=tolerance)
    tests = _chosen(problem.tests, max_tests, text)
    program = extract_program(completion)
    if program is None:
        return _Judged(len(tests), 0, frozenset({"no_code"}))
    config = shared_config()

    def run() -> _Judged:
        return _run_tests(program, replace(problem, tests=tests), max_timeouts)

    if config.refuse_inside_verdicts and any(test.inside for test in tests):
        raise ValueError("a test needs a verdict inside; sandbox.refuse_inside_verdicts is true")
    return _remembered((program, text, max_tests, max_timeouts, tolerance, config), run)


def _chosen(tests: tuple[CodeTest, ...], max_tests: int | None, text: str) -> tuple[CodeTest, ...]:
    if max_tests is None or len(tests) <= max_tests:
        return tests
    # Seeded by the problem alone: every completion, of every step, meets the same tests.
    return tuple(tests[i] for i in sorted(Random(text).sample(range(len(tests)), max_tests)))


def _run_tests(program: str, problem: CodeTests, max_timeouts: int) -> _Judged:
    sandbox = shared_sandbox()
    tests, limits = problem.tests, problem.limits(sandbox.limits)
    events: set[str] = set()
    num_passed = num_timeouts = 0
    end = time.monotonic() + max_timeouts * NUM_TRIES * limits.wall_seconds
    for test in tests:
        if time.monotonic() > end:  # many slow tests end as a few that time out do
            events.add(str(Status.TIMEOUT))
            break
        done = test.run(sandbox, program, limits)
        if done.isolation == "unsafe":
            events.add("unsafe")
        if done.status is Status.INFRA_ERROR:
            return _Judged(len(tests), 0, frozenset({*events, str(done.status)}), done.detail)
        if test.inside:
            events.add("verdict_inside")
        if done.status is Status.OK:
            num_passed += test.passed(done)
            continue
        events.add(str(done.status))
        num_timeouts += done.status is Status.TIMEOUT
        if is_fatal(done.status) or num_timeouts >= max_timeouts:
            break
    return _Judged(len(tests), num_passed, frozenset(events))


_memory_lock = threading.Lock()
_memory: OrderedDict[tuple[str, str, int | None, int, float, SandboxConfig], Future[_Judged]]
_memory = OrderedDict()


def _remembered(key: Any, run: Any) -> _Judged:
    """The result of `run` for this key; two rewards of a completion ask within moments."""
    with _memory_lock:
        future = _memory.get(key)
        mine = future is None
        if future is None:
            future = _memory[key] = Future[_Judged]()
            while len(_memory) > _MAX_REMEMBERED:
                _memory.popitem(last=False)
    if not mine:
        return future.result()
    try:
        judged = run()
    except BaseException as error:
        _forget(key)
        future.set_exception(error)
        raise
    if judged.fault:  # the next one may have more luck
        _forget(key)
    future.set_result(judged)
    return judged


def _forget(key: Any) -> None:
    with _memory_lock:
        _memory.pop(key, None)


# ---- registered ----------------------------------------------------------------------------------


@register_reward("code_pass_rate", check_answer=validate_tests)
@uses_sandbox
def code_pass_rate(
    sample: RewardSample,
    max_tests: PositiveInt | None = None,
    max_timeouts: PositiveInt = 2,
    float_tolerance: NonNegativeFloat = 0.0,
) -> RewardResult:
    """`pass_rate` against the row's tests; does not apply to rows without any."""
    if sample.answer is None:
        return NOT_APPLICABLE
    return pass_rate(
        sample.completion,
        sample.answer,
        max_tests=max_tests,
        max_timeouts=max_timeouts,
        float_tolerance=float_tolerance,
    )


@register_reward("code_bug_free", check_answer=validate_tests)
@uses_sandbox
def code_bug_free(
    sample: RewardSample,
    max_tests: PositiveInt | None = None,
    max_timeouts: PositiveInt = 2,
    float_tolerance: NonNegativeFloat = 0.0,
) -> RewardResult:
    """`bug_free` against the row's tests; does not apply to rows without any."""
    if sample.answer is None:
        return NOT_APPLICABLE
    return bug_free(
        sample.completion,
        sample.answer,
        max_tests=max_tests,
        max_timeouts=max_timeouts,
        float_tolerance=float_tolerance,
    )
