"""What small models are shown before RL earns what it is said to earn, from the tasks' own rewards.

Not covered: pass rates of the programs, which depend on the problem.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from gdpo_megatron.rewards.builtin import gsm8k, math, tool_call

FILE = Path(__file__).resolve().parents[3] / "examples/cpu/warm_start.py"

CALL = '<tool_call>\n{"name": "f", "parameters": {"x": 1}}\n</tool_call>'


@pytest.fixture(scope="module")
def warm_start() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tasks_warm_start", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tool_calls(warm_start: ModuleType):
    gold = f"<think> long thoughts </think>\n{CALL}"
    texts = [warm_start.tool_call({"answer": gold}, number) for number in range(6)]
    assert [tool_call.format_reward(it, gold) for it in texts] == [1, 1, 0, 1, 1, 0]
    assert {tool_call.correctness_reward(it, gold) for it in texts} == {3.0}
    longer = gold.replace("x", "x" * 200)
    assert warm_start.tool_call({"answer": longer}, 0) is None
    answered = "<think> t </think>\n<response> hello </response>"
    assert warm_start.tool_call({"answer": answered}, 0) is None


def test_gsm8k(warm_start: ModuleType):
    texts = [warm_start.gsm8k({"answer": "1,600"}, number) for number in range(6)]
    assert texts[0] == "<think>That makes 1600.</think>\n<answer>1600</answer>"
    assert [gsm8k.format_reward(it) for it in texts] == [1, 1, 0, 1, 1, 1]
    assert [gsm8k.integer_reward(it) for it in texts] == [1, 1, 1, 1, 1, 0]
    assert [gsm8k.correctness_reward(it, "1600") for it in texts] == [1, 1, 1, 1, 1, 0]


def test_math(warm_start: ModuleType):
    row = {"answer": "\\frac{1}{2}"}
    texts = [warm_start.math(row, number) for number in range(3)]
    assert texts[0] == "The answer is $\\boxed{\\frac{1}{2}}$."
    assert [math.last_boxed(it) for it in texts] == ["\\frac{1}{2}"] * 3
    assert len({len(it) for it in texts}) == 3


def test_programs_stand_in_a_block_of_their_own(warm_start: ModuleType):
    seen = {warm_start.code({}, number) for number in range(18)}
    assert len(seen) == 18
    assert all(it.count("```") == 2 and it.endswith("\n```") for it in seen)
    compiled = 0
    for text in seen:
        program = text.split("```python\n")[1].removesuffix("\n```")
        try:
            compile(program, "program", "exec")
            compiled += 1
        except SyntaxError:
            pass
    assert compiled == 15  # five of six programs, behind three openings


def test_every_task_has_one(warm_start: ModuleType):
    assert set(warm_start.WARM_STARTS) == {"tool_calling", "gsm8k", "math", "code"}
