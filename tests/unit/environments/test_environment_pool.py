"""What the pool does with environments that hang, grow, die or raise, and that no episode mixes.

Processes are real. Not covered: a trainer that is killed (the kernel then kills the workers).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gdpo_megatron.config.environment import EnvironmentConfig
from gdpo_megatron.environments import pool as pool_module
from gdpo_megatron.environments.base import EnvironmentStep, Task
from gdpo_megatron.environments.pool import Answer, EnvironmentPool, Fault
from gdpo_megatron.environments.resolve import environment_factory
from gdpo_megatron.errors import InputError

HERE = Path(__file__).parent.parent / "rollout"
TASK = Task(prompt="p", answer="a", metadata={"k": [1]})


def pool(tmp_path: Path, **fields: Any) -> EnvironmentPool:
    defaults: dict[str, Any] = {
        "type": "./episode_environments.py:Scripted",
        "args": {"folder": str(tmp_path)},
        "num_workers": 1,
        "step_timeout_seconds": 600.0,
    }
    config = EnvironmentConfig(**(defaults | fields))
    return EnvironmentPool(config, base_dir=HERE, log_path=tmp_path / "log")


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[EnvironmentPool]:
    with pool(tmp_path) as made:
        yield made


def ask(pool: EnvironmentPool, episode: int, *turns: str) -> Answer:
    pool.step(episode, TASK, turns)
    (answer,) = pool.answers(wait=True)
    assert answer.episode == episode and answer.seconds >= 0
    return answer


def said(answer: Answer) -> tuple[int, str]:
    """(process, what the environment has been told) of an answer."""
    assert isinstance(answer.outcome, EnvironmentStep), answer.outcome
    pid, text = answer.outcome.observation.split(" ", 1)
    return int(pid), text


def test_episodes_are_kept_apart_and_remembered(scripted: EnvironmentPool, tmp_path: Path):
    pid, text = said(ask(scripted, 0, "x"))
    assert text == "p/a/x"
    assert said(ask(scripted, 1, "y")) == (pid, "p/a/y")
    assert said(ask(scripted, 0, "x", "z")) == (pid, "p/a/x+z")
    scripted.forget([0])
    # Forgotten, or never known here: made anew from the turns.
    assert said(ask(scripted, 0, "x", "z", "w")) == (pid, "p/a/x+z+w")
    assert said(ask(scripted, 5, "1", "2", "3")) == (pid, "p/a/1+2+3")
    assert scripted.num_open == 0 and scripted.answers(wait=True) == []
    assert scripted.take_counts().total() == 0
    assert "said: z" in (tmp_path / "log").read_text()


def test_many_answers_come_with_their_episode(tmp_path: Path):
    with pool(tmp_path, num_workers=3) as three:
        for episode in range(30):
            three.step(episode, TASK, [f"turn {episode}"])
        answers: list[Answer] = []
        while three.num_open:
            answers += three.answers(wait=True)
    assert sorted(it.episode for it in answers) == list(range(30))
    assert all(said(it)[1] == f"p/a/turn {it.episode}" for it in answers)
    assert len({said(it)[0] for it in answers}) == 3


def test_a_call_that_hangs_is_ended_and_the_others_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Only the call that never answers meets a time that a slow machine could meet."""
    exchange, limits = pool_module._Worker._exchange, list[float]()

    def exchange_in_time(worker: Any, process: Any, text: bytes, seconds: float) -> Any:
        limits.append(seconds)
        return exchange(worker, process, text, 0.5 if b'"hang"' in text else seconds)

    monkeypatch.setattr(pool_module._Worker, "_exchange", exchange_in_time)
    with pool(tmp_path, step_timeout_seconds=700.0) as short:
        first, _ = said(ask(short, 0, "x"))
        outcome = ask(short, 1, "hang").outcome
        assert outcome == Fault("environment timeout", "no answer within 0.5 s")
        assert not psutil.pid_exists(first)
        second, text = said(ask(short, 0, "x", "y"))
        assert second != first and text == "p/a/x+y"
        assert short.take_counts() == {"environment timeout": 1}
        assert short.take_counts().total() == 0
    start = pool_module.START_SECONDS
    assert limits == [start, 700.0, 700.0, start, 700.0]


def test_a_call_that_grows_is_ended(tmp_path: Path):
    with pool(tmp_path, worker_memory_mb=400) as small:
        outcome = ask(small, 0, "eat").outcome
        # It may have answered before it was looked at; then it is ended with the next call.
        if isinstance(outcome, EnvironmentStep):
            outcome = ask(small, 0, "eat", "hang").outcome
        assert isinstance(outcome, Fault) and outcome.reason == "environment memory limit"
        assert said(ask(small, 1, "x"))[1] == "p/a/x"


def test_a_process_that_dies_is_tried_once_more(scripted: EnvironmentPool):
    first, _ = said(ask(scripted, 0, "x"))
    second, text = said(ask(scripted, 0, "x", "die once"))
    assert second != first and text == "p/a/x+die once"
    assert ask(scripted, 1, "die").outcome == Fault("environment process died")
    assert said(ask(scripted, 0, "x", "die once", "y"))[1] == "p/a/x+die once+y"
    assert scripted.take_counts() == {"environment process died": 3}


@pytest.mark.parametrize(
    ("turn", "why"),
    [("raise", "KeyError: 'no such thing'"), ("nothing", "TypeError: step returned NoneType")],
)
def test_what_raises_is_a_fault_with_its_traceback(scripted: EnvironmentPool, turn: str, why: str):
    pid, _ = said(ask(scripted, 0, "x"))
    outcome = ask(scripted, 1, turn).outcome
    assert isinstance(outcome, Fault) and outcome.reason == "environment raised"
    assert outcome.detail.startswith(why) and "Traceback" in outcome.traceback
    assert said(ask(scripted, 0, "x", "y"))[0] == pid, "the process goes on"


def test_no_process_outlives_the_pool(tmp_path: Path):
    with pool(tmp_path, num_workers=2) as two:
        pids = [said(ask(two, episode, "x"))[0] for episode in (0, 1)]
        two.step(2, TASK, ["hang"])
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    with pytest.raises(RuntimeError, match="closed"):
        two.step(3, TASK, ["x"])


def test_a_worker_that_cannot_start_says_why(tmp_path: Path):
    with pool(tmp_path, type="./no_such_file.py:Echo") as broken:
        broken.step(0, TASK, ["x"])
        with pytest.raises(RuntimeError, match=r"cannot start: .*no_such_file"):
            broken.answers(wait=True)


@pytest.mark.parametrize(
    ("kind", "args", "problem"),
    [
        ("tols", {}, "rollout.environment.type: no environment named 'tols'; did you mean 'tools'"),
        ("./episode_environments.py:Ehco", {}, "has no 'Ehco'; did you mean 'Echo'"),
        ("./episode_environments.py:Echo", {"turns": 3}, "args: got an unexpected keyword"),
        ("./episode_environments.py:needs_a_number", {}, "args: missing a required argument"),
        ("./episode_environments.py:needs_a_number", {"number": 0}, "refuses them: number is 0"),
        ("./episode_environments.py:no_environment", {}, "has no reset and no step"),
    ],
)
def test_a_section_that_cannot_work_is_refused(kind: str, args: dict[str, Any], problem: str):
    with pytest.raises(InputError) as refused:
        environment_factory(kind, args, HERE)
    assert problem in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"observation": ""}, "observation is empty"),
        ({"observation": 3}, "must be a text"),
        ({"observation": "x", "rewards": {"a": float("nan")}}, "'a' is nan"),
        ({"observation": "x", "rewards": {"a": "high"}}, "'a' is 'high'"),
    ],
)
def test_a_step_is_checked_where_it_is_made(fields: dict[str, Any], problem: str):
    with pytest.raises((TypeError, ValueError), match=problem):
        EnvironmentStep(**fields)
    EnvironmentStep(done=True)
    assert json.dumps(EnvironmentStep(observation="x", rewards={"a": True}).rewards)
