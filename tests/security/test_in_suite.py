"""Code rewards in the worker processes of a suite: scores, events, and nothing left behind.

Each worker has a sandbox of its own; one that is killed takes it along. Not covered: the metrics'
names (tests/unit/rewards).
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import psutil
from conftest import start

from gdpo_megatron.config.sandbox import SandboxConfig
from gdpo_megatron.config.schema import RewardConfig, RewardSuiteConfig
from gdpo_megatron.rewards.suite import RewardSuite
from gdpo_megatron.types import Completion, Prompt, Rollout

TESTS = json.dumps({"asserts": ["assert f(1) == 2", "assert f(5) == 6"]})
BRIEF = json.dumps({**json.loads(TESTS), "time_limit_seconds": 1})
REWARDS = (
    RewardConfig(name="tests", type="code_pass_rate", args={"max_timeouts": 1}),
    RewardConfig(name="bug", type="code_bug_free", args={"max_timeouts": 1}),
)
SANDBOX = SandboxConfig(mode="inner", cpu_seconds=60, wall_seconds=600.0)
SANDBOX_OF_HOURS = replace(SANDBOX, cpu_seconds=3000, wall_seconds=5000.0)


def rollout(sample_id: int, program: str, answer: str | None = TESTS) -> Rollout:
    return Rollout(
        group_id=0,
        sample_id=sample_id,
        prompt=Prompt(prompt_id="row", token_ids=(1,), text="Write f.", answer=answer, metadata={}),
        completion=Completion(
            token_ids=(5,),
            logprobs=(0.0,),
            text=f"```python\n{program}\n```",
            finish_reason="stop",
        ),
        policy_version=0,
    )


def servers(suite: RewardSuite) -> list[psutil.Process]:
    """Fork servers and their programs, below a suite's processes."""
    assert suite._pool is not None
    found = []
    for process in psutil.Process(suite._pool.pid).children(recursive=True):
        # One that ends while it is looked at is not there any more.
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie's error is one of these
            if any("recv(1 << 20)" in argument for argument in process.cmdline()):
                found.append(process)
    return found


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def none_left(processes: list[psutil.Process]) -> bool:
    deadline = time.monotonic() + 120
    while any(map(alive, processes)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_scores_and_events():
    start("inner").close()
    programs = [
        ("def f(x): return x + 1", 1.0, 1.0),
        ("def f(x): return 2", 0.5, 1.0),
        ("def f(x): return 1 / (x - 1)", 0.0, 0.0),
        ("def f(x", 0.0, 0.0),
        ("import os\ndef f(x): return os.fork()", 0.0, 0.0),
        ("def f(x): return [0] * 10**9", 0.0, 0.0),
        ("def f(x):\n    while True: pass", 0.0, 0.0),
        ("def f(x): return x + 1  # again", 1.0, 1.0),
    ]
    config = RewardSuiteConfig(num_workers=2, sample_timeout_seconds=6000.0)
    with RewardSuite(REWARDS, group_size=len(programs), config=config, sandbox=SANDBOX) as suite:
        for number, (program, _, _) in enumerate(programs):
            suite.submit(rollout(number, program, BRIEF if "while" in program else TESTS))
        scores = suite.collect()
        there = servers(suite)
        assert 1 <= len(there) <= 2  # one for each worker that had work
    assert scores.values.tolist() == [[rate, bug] for _, rate, bug in programs]
    once = dict.fromkeys(("compile_error", "denied", "memory", "runtime_error", "timeout"), 1)
    assert scores.report.events == {"tests": once, "bug": once}
    assert none_left(there)


def test_worker_that_is_killed_takes_its_sandbox_along(told: None, tmp_path: Path):
    """The time for a sample is over before the program's, which a job may not have."""
    start("inner").close()
    go = tmp_path / "go"
    reward = RewardConfig(
        name="tests", type="./overdue_rewards.py:tests_until", args={"path": str(go)}
    )
    with RewardSuite(
        [reward],
        group_size=2,
        config=RewardSuiteConfig(num_workers=1, sample_timeout_seconds=6000.0),
        sandbox=SANDBOX_OF_HOURS,
        base_dir=Path(__file__).parent,
    ) as suite:
        suite.submit(rollout(0, "while True: pass"))
        suite.submit(rollout(1, "def f(x): return x + 1"))
        deadline = time.monotonic() + 120
        while not (there := servers(suite)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert there
        go.touch()
        scores = suite.collect()
        assert none_left(there)
        there = servers(suite)
    hung, right = scores.values[:, 0].tolist()
    assert math.isnan(hung) and right == 1.0
    assert scores.num_invalid["tests"] == {"sample timeout": 1}
    assert none_left(there)
