"""What is wrong with `rollout.environment` is told before a rank is started."""

from __future__ import annotations

from typing import Any

import pytest
from support.cli_job import Cli, Job

from gdpo_megatron import validate_environment
from gdpo_megatron.config.sandbox import SandboxConfig
from gdpo_megatron.sandbox import SandboxUnavailable, configure

REWARD = {"name": "tool", "type": "environment", "args": {"name": "used_tool"}}


@pytest.fixture(autouse=True)
def _default_sandbox():
    yield
    configure(SandboxConfig())  # the launcher configures the process it runs in


@pytest.fixture
def tools_job(job: Job) -> Job:
    job.edit({"rewards": [REWARD], "rollout.environment": section()})
    return job


def section(*tools: str, **more: Any) -> dict[str, Any]:
    return {"type": "tools", "args": {"tools": list(tools or ["calculator"])}, **more}


def lines(run_cli: Cli) -> list[str]:
    outcome = run_cli("train", "config.yaml")
    assert outcome.code == 2, outcome
    return [line.removeprefix("gdpo-megatron: ") for line in outcome.err.splitlines()]


def test_a_fine_one_starts(tools_job: Job, run_cli: Cli):
    assert run_cli("train", "config.yaml").code == 0


def test_rewards_without_an_environment(tools_job: Job, run_cli: Cli):
    tools_job.edit({"rollout.environment": None})
    assert lines(run_cli) == ["rewards 'tool': type environment needs rollout.environment"]


def test_a_reward_that_the_environment_does_not_give(tools_job: Job, run_cli: Cli):
    tools_job.edit({"rewards": [{**REWARD, "args": {"name": "used_tol"}}]})
    assert lines(run_cli) == [
        "rewards 'tool': the environment gives no reward 'used_tol'; did you mean 'used_tool'?"
    ]


def test_no_such_environment_or_tool(tools_job: Job, run_cli: Cli):
    tools_job.edit({"rollout.environment": section("calculater")})
    assert lines(run_cli) == [
        "rollout.environment.args: tools[0]: no tool named 'calculater'; did you mean 'calculator'?"
    ]
    tools_job.edit({"rollout.environment": {"type": "tool"}})
    assert lines(run_cli) == [
        "rollout.environment.type: no environment named 'tool'; did you mean 'tools'?"
    ]


def test_programs_need_time_and_a_sandbox(
    tools_job: Job, run_cli: Cli, monkeypatch: pytest.MonkeyPatch
):
    def refuse(config: SandboxConfig) -> None:
        raise SandboxUnavailable(["bwrap: missing", "inner: missing"])

    monkeypatch.setattr(validate_environment, "Sandbox", refuse)
    tools_job.edit({"rollout.environment": section("python", step_timeout_seconds=40.0)})
    who = "rollout.environment runs programs of the model"
    assert lines(run_cli) == [
        "rollout.environment.step_timeout_seconds is 40, but programs of the model may take 40 s "
        "of a step; set it above that, or lower sandbox.wall_seconds 10",
        f"{who}: bwrap: missing",
        f"{who}: inner: missing",
    ]
    tools_job.edit({"sandbox.wall_seconds": 9.0})
    assert lines(run_cli) == [f"{who}: bwrap: missing", f"{who}: inner: missing"]
    # A calculator runs nothing.
    tools_job.edit({"rollout.environment": section("calculator", step_timeout_seconds=1.0)})
    assert run_cli("train", "config.yaml").code == 0
