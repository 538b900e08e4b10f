"""The tool `python` on the real sandbox: what the model reads, and that nothing is kept."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from gdpo_megatron.environments.base import EnvironmentStep, Task
from gdpo_megatron.environments.tools import ToolsEnvironment, python
from gdpo_megatron.sandbox import Sandbox


@pytest.fixture
def environment(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> ToolsEnvironment:
    monkeypatch.setattr(python, "shared_sandbox", lambda: sandbox)
    environment = ToolsEnvironment(["python"], response_tag=None)
    environment.reset(Task(prompt="p"))
    return environment


def ask(environment: ToolsEnvironment, *programs: str) -> EnvironmentStep:
    calls = [{"name": "python", "arguments": {"code": program}} for program in programs]
    return environment.step("".join(f"<tool_call>{json.dumps(call)}</tool_call>" for call in calls))


def test_what_programs_print(environment: ToolsEnvironment):
    done = ask(environment, "print(6 * 7)", "x = 1", "import math\nprint(math.gcd(12, 18))")
    assert done.observation == "42\n(the program printed nothing)\n6"
    assert done.rewards["used_tool"] == 1.0


def test_what_failing_programs_are_told(environment: ToolsEnvironment):
    done = ask(environment, "print('so far')\n1 / 0")
    assert done.observation.splitlines()[0] == "so far"
    assert done.observation.splitlines()[-1] == "ZeroDivisionError: division by zero"
    assert "line 2" in done.observation
    assert ask(environment, "print(").observation.splitlines()[-1].startswith("SyntaxError: ")
    assert ask(environment, "import sys; sys.exit(3)").observation == "exit code 3"
    assert done.rewards == {"calls": 0, "call_errors": 0, "tool_errors": 1, "used_tool": 0}


def test_programs_that_are_ended(
    environment: ToolsEnvironment, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "limits", replace(sandbox.limits, cpu_seconds=1))
        said = ask(environment, "print(1, flush=True)\nwhile True: pass").observation
    assert said == "1\nthe program took too long and was ended"
    said = ask(environment, "while True: print('x' * 1000)").observation
    assert said.endswith("the program printed too much and was ended") and len(said) < 2100
    assert ask(environment, "print(2)").observation == "2"


def test_nothing_is_kept_between_calls(environment: ToolsEnvironment):
    change = "import builtins, math; builtins.kept = 1; math.pi = 3; kept = 2; print('done')"
    look = "import math; print(round(math.pi, 2)); print(kept)"
    first, *rest = ask(environment, change, look).observation.splitlines()
    assert (first, rest[0]) == ("done", "3.14")
    assert rest[-1] == "NameError: name 'kept' is not defined"


def test_what_a_program_may_not(environment: ToolsEnvironment, tmp_path):
    (tmp_path / "secret").write_text("secret")
    for program in (
        f"print(open({str(tmp_path / 'secret')!r}).read())",
        "import subprocess; print(subprocess.run(['id']))",
        "import socket; socket.create_connection(('127.0.0.1', 1))",
    ):
        done = ask(environment, program)
        assert done.rewards["tool_errors"] == 1.0
        assert "secret" not in done.observation.replace("/secret", "")
