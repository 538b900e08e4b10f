"""Reference solutions of MBPP and HumanEval pass their own tests, through the sandbox.

Their tests are asserts: all but a few are taken apart, so that the comparison happens outside. Not
covered: that wrong solutions fail (a mutated one does, below; the rest is the data sets' claim).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from harness import quick_config
from support.assets import needed

from gdpo_megatron.config.sandbox import SandboxConfig
from gdpo_megatron.rewards.builtin import code
from gdpo_megatron.rewards.builtin.code_tests import parse_tests
from gdpo_megatron.sandbox import close_shared, configure

Problem = tuple[str, str, str]


def mbpp() -> list[Problem]:
    """(name, program, tests) of all 974."""
    folder = needed("data/mbpp")
    rows = [
        json.loads(line)
        for part in ("prompt", "train", "validation", "test")
        for line in (folder / f"{part}.jsonl").read_text().splitlines()
    ]
    return [
        (
            f"mbpp/{row['task_id']}",
            row["code"],
            json.dumps({"asserts": row["test_list"], "setup": row["test_setup_code"]}),
        )
        for row in rows
    ]


def humaneval() -> list[Problem]:
    lines = (needed("data/humaneval") / "test.jsonl").read_text().splitlines()
    return [
        (
            row["task_id"],
            row["prompt"] + row["canonical_solution"],
            json.dumps({"check": row["test"], "entry_point": row["entry_point"]}),
        )
        for row in map(json.loads, lines)
    ]


@pytest.fixture(scope="module")
def two_workers() -> Iterator[None]:
    # Some of the programs compute for seconds; on a busy machine their clock runs out first.
    configure(SandboxConfig(cpu_seconds=60, wall_seconds=600.0), num_workers=2)
    yield
    close_shared()
    configure(SandboxConfig())


def failed(problems: list[Problem], reward=code.pass_rate) -> list[tuple[str, object]]:
    with ThreadPoolExecutor(2) as threads:
        scores = threads.map(lambda p: reward(f"```python\n{p[1]}\n```", p[2]), problems)
        return [(p[0], score) for p, score in zip(problems, scores, strict=True) if score != 1.0]


def test_mbpp(two_workers: None):
    problems = mbpp()
    assert len(problems) == 974
    assert failed(problems) == []


def test_humaneval(two_workers: None):
    problems = humaneval()
    assert len(problems) == 164
    assert failed(problems) == []
    assert failed(problems[:20], code.bug_free) == []


def test_few_verdicts_are_inside():
    """Of 2922 and 1106 tests; these are what refuse_inside_verdicts would refuse."""
    for problems, num_tests, inside in (
        (mbpp(), 2922, MBPP_INSIDE),
        (humaneval(), 1106, HUMANEVAL_INSIDE),
    ):
        parsed = [(name, parse_tests(tests).tests) for name, _, tests in problems]
        assert sum(len(tests) for _, tests in parsed) == num_tests
        assert [name for name, tests in parsed if any(t.inside for t in tests)] == inside


MBPP_INSIDE: list[str] = []
HUMANEVAL_INSIDE = [f"HumanEval/{n}" for n in (32, 38, 44, 50, 53, 129, 151)]


def test_wrong_solution_fails(two_workers: None):
    _, program, tests = humaneval()[0]
    assert "return True" in program and "return False" in program
    wrong = program.replace("return True", "return False")
    score = code.pass_rate(f"```python\n{wrong}\n```", tests)
    assert score == pytest.approx(3 / 7)  # three of its seven asserts expect False
    assert code.bug_free(f"```python\n{wrong}\n```", tests) == 1.0


def test_code_contests_tests_are_understood():
    lines = (needed("data/code_contests_small") / "train.jsonl").read_text().splitlines()
    assert len(lines) == 125
    for line in lines:
        tests = json.loads(line)["tests"]
        parsed = parse_tests(json.dumps(tests))
        assert len(parsed.tests) == len(tests["inputs"])
        assert not any(test.inside for test in parsed.tests)


def test_quick_limits_are_enough_for_a_reference():
    configure(quick_config("auto"))
    try:
        _, program, tests = humaneval()[3]
        assert code.pass_rate(f"```python\n{program}\n```", tests) == 1.0
    finally:
        close_shared()
