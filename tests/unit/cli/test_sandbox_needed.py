"""A job whose rewards run programs is refused, before a rank is started, where it cannot."""

from __future__ import annotations

import json

import pytest
from support.cli_job import Cli, Job

from gdpo_megatron import validate
from gdpo_megatron.config.sandbox import SandboxConfig
from gdpo_megatron.sandbox import SandboxUnavailable, configure

TESTS = json.dumps({"asserts": ["assert f(1) == 2"]})
REWARDS = [{"name": "tests", "type": "code_pass_rate"}]


@pytest.fixture(autouse=True)
def _default_sandbox():
    yield
    configure(SandboxConfig())  # the launcher configures the process it runs in


@pytest.fixture
def code_job(job: Job) -> Job:
    job.edit({"rewards": REWARDS, "reward_suite.sample_timeout_seconds": 61.0})
    job.write_rows([{"prompt": "Write f.", "answer": TESTS}])
    return job


def lines(run_cli: Cli, *arguments: str) -> list[str]:
    outcome = run_cli("train", "config.yaml", *arguments)
    assert outcome.code == 2, outcome
    return [line.removeprefix("gdpo-megatron: ") for line in outcome.err.splitlines()]


def test_starts_where_there_is_one(code_job: Job, run_cli: Cli, monkeypatch: pytest.MonkeyPatch):
    made: list[SandboxConfig] = []

    class Made:
        def __init__(self, config: SandboxConfig):
            made.append(config)

        def close(self) -> None:
            made.append(SandboxConfig())

    monkeypatch.setattr(validate, "Sandbox", Made)
    assert run_cli("train", "config.yaml", "--sandbox.memory_mb", "99").code == 0
    assert [config.memory_mb for config in made] == [99, 512]  # started, and closed again


def test_no_sandbox(code_job: Job, run_cli: Cli, monkeypatch: pytest.MonkeyPatch):
    def refuse(config: SandboxConfig) -> None:
        raise SandboxUnavailable(["bwrap: missing", "inner: missing"])

    monkeypatch.setattr(validate, "Sandbox", refuse)
    who = "rewards tests run programs of the model"
    assert lines(run_cli) == [f"{who}: bwrap: missing", f"{who}: inner: missing"]
    assert not code_job.started
    # Rewards that run nothing do not ask for one.
    code_job.edit({"rewards": [{"name": "short", "type": "length", "args": {"limit": 8}}]})
    assert run_cli("train", "config.yaml").code == 0


def test_suite_that_would_cut_programs_off(
    code_job: Job, run_cli: Cli, monkeypatch: pytest.MonkeyPatch
):
    class Fine:
        def __init__(self, config: SandboxConfig):
            pass

        def close(self) -> None:
            pass

    monkeypatch.setattr(validate, "Sandbox", Fine)
    (line,) = lines(run_cli, "--reward_suite.sample_timeout_seconds", "60")
    assert line == (
        "reward_suite.sample_timeout_seconds is 60, but the programs of reward 'tests' may take "
        "60 s (2 tries x sandbox.wall_seconds 10 x (max_timeouts 2 + 1)); set it above that"
    )
    code_job.edit({"rewards": [{**REWARDS[0], "args": {"max_timeouts": 1}}]})
    assert run_cli("train", "config.yaml", "--reward_suite.sample_timeout_seconds", "41").code == 0


def test_verdicts_inside_are_refused_at_load(
    code_job: Job, run_cli: Cli, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(validate, "_sandbox", lambda *given: [])
    loop = json.dumps({"asserts": ["for i in range(3):\n    assert f(i)"]})
    code_job.write_rows([{"prompt": "Write f.", "answer": loop}])
    assert run_cli("train", "config.yaml").code == 0
    (line,) = lines(run_cli, "--sandbox.refuse_inside_verdicts", "true")
    assert "1 of 1 tests can only be judged inside the sandbox" in line


def test_wall_clock_below_cpu_time(code_job: Job, run_cli: Cli):
    (line,) = lines(run_cli, "--sandbox.cpu_seconds", "10")
    assert line.startswith("sandbox: ")
    assert "wall_seconds 10.0 must be above cpu_seconds 10" in line
