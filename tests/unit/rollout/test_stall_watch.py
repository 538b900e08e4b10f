"""An engine that stops making progress, and one that is only slow.

Engines here wait for what the watch does to them, never for a time. The call that no exception can
leave ends the process, so it is made in one of its own.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import ScriptedEngine, greedy

from gdpo_megatron.config.long_tail import LongTailConfig
from gdpo_megatron.rollout.base import FinishedCompletion
from gdpo_megatron.rollout.failure import EngineStalled, FailureReport
from gdpo_megatron.rollout.generation import Generation, Noise
from gdpo_megatron.rollout.long_tail import GroupRequest, TailCut
from gdpo_megatron.rollout.stall import StallLimit, StallWatch
from gdpo_megatron.types import Prompt, Rollout

SECONDS = 120  # until a test is given up


class Engine(ScriptedEngine):
    """Ends after two tokens each; its second poll does what a test says."""

    def __init__(self, second_poll: Any):
        super().__init__({(1,): (5, 6), (2,): (5, 6, 7)}, {}, max_sequence_length=8)
        self.load_weights([], 3)
        self._second_poll, self._num_polls = second_poll, 0

    def poll(self) -> list[FinishedCompletion]:
        self._num_polls += 1
        if self._num_polls == 2:
            self._second_poll(self)
        return super().poll()


def limit_of(folder: Path, seconds: float, **others: float) -> StallLimit:
    """One whose exception is taken in time on any machine, unless `others` say otherwise."""
    times = {"grace_seconds": SECONDS, "margin_seconds": SECONDS} | others
    return StallLimit(
        seconds=seconds, folder=folder, goes_on=lambda: "goes on from step 7", **times
    )


def generate(engine: ScriptedEngine, limit: StallLimit) -> FailureReport | None:
    groups = [
        GroupRequest(
            prompt=Prompt(prompt_id=str(i), token_ids=(i,), text=""), noise_step=0, noise_group=i
        )
        for i in (1, 2)
    ]
    finished: list[Rollout] = []
    generation = Generation(
        groups,
        [0, 1],
        group_size=1,
        first_group=0,
        noise=Noise(0, "train"),
        engine=engine,
        tail=TailCut(
            LongTailConfig(),
            groups,
            [0, 0],
            replica=0,
            num_replicas=1,
            group_size=1,
            num_wanted=2,
        ),
        on_progress=lambda done, total: None,
        on_finished=finished.append,
    )
    return generation.run(greedy(4), limit, rank=4, replica=2)


def test_a_stalled_call_is_interrupted_and_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    def sleeps(engine: Engine) -> None:
        time.sleep(SECONDS)

    before = signal.getsignal(signal.SIGALRM)
    report = generate(Engine(sleeps), limit_of(tmp_path, 1.0))
    assert report is not None
    assert report.told() == (
        "rollout engine 2 failed on rank 4 with 1 of 2 completions unfinished: EngineStalled: no "
        "token for 1 s (rollout.stall_timeout_seconds); see its stacks above; raise "
        "rollout.stall_timeout_seconds if it was only slow"
    )
    assert "in sleeps" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGALRM) is before
    assert "stall watch" not in {thread.name for thread in threading.enumerate()}
    assert not list(tmp_path.iterdir())


def test_tokens_are_progress_however_long_the_call_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    looks = [0]

    def look(engine: Engine) -> int:
        looks[0] += 1
        return looks[0]  # another token each time that the watch looks

    def draws(engine: Engine) -> None:
        # It looks eight times within its limit.
        end, enough = time.monotonic() + SECONDS, looks[0] + 30
        while looks[0] < enough and time.monotonic() < end:
            time.sleep(0.01)

    counter = property(look, lambda engine, value: None)
    monkeypatch.setattr(Engine, "num_generated_tokens", counter, raising=False)
    assert generate(Engine(draws), limit_of(tmp_path, 0.2)) is None
    assert looks[0] >= 30


def test_time_between_the_calls_is_not_the_engines(tmp_path: Path):
    engine = Engine(lambda engine: None)
    with StallWatch(engine, limit_of(tmp_path, 0.1), 0) as watch:
        with watch.call("nothing"):
            pass
        time.sleep(0.5)


def test_what_a_call_waits_for_is_not_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nor is it interrupted there; and what was not drawn yet is still there afterwards."""
    looks = [0]

    def look(engine: Engine) -> int:
        looks[0] += 1
        return 0  # no progress that the watch could see

    def made() -> Iterator[int]:
        for number in range(4):
            # It looks eight times within its limit.
            end, enough = time.monotonic() + SECONDS, looks[0] + 20
            while number == 1 and looks[0] < enough and time.monotonic() < end:
                time.sleep(0.01)
            yield number

    counter = property(look, lambda engine, value: None)
    monkeypatch.setattr(Engine, "num_generated_tokens", counter, raising=False)
    items, drawn = made(), list[int]()
    with (
        StallWatch(Engine(None), limit_of(tmp_path, 0.5), 0) as watch,
        pytest.raises(EngineStalled, match=r"^no progress of load for 0\.5 s \(rollout\.stall_t"),
        watch.call("no progress of load"),
    ):
        for item in watch.outside(items):
            drawn.append(item)
            if item == 2:
                time.sleep(SECONDS)
    assert drawn == [0, 1, 2] and list(items) == [3]
    assert looks[0] >= 20


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "MemoryError; out of memory: lower rollout.max_concurrent_sequences"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB; out of memory: lower",
        ),
        (RuntimeError("[enforce fail] can't allocate memory: 8 GiB"), "out of memory: lower"),
        (KeyError("request 5"), "KeyError: 'request 5'; its traceback is above"),
    ],
)
def test_an_exception_is_told_with_what_to_try(
    error: Exception, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    def raises(engine: Engine) -> None:
        raise error

    report = generate(Engine(raises), limit_of(tmp_path, SECONDS))
    assert report is not None and said in report.told()
    assert "with 1 of 2 completions unfinished" in report.told()
    assert "in raises" in capfd.readouterr().err


def test_a_fault_of_what_is_called_back_is_not_the_engines(tmp_path: Path):
    engine = Engine(lambda engine: None)
    engine.num_generated_tokens = 0
    with pytest.raises(ZeroDivisionError):
        generation = Generation(
            [
                GroupRequest(
                    prompt=Prompt(prompt_id="1", token_ids=(1,), text=""),
                    noise_step=0,
                    noise_group=0,
                )
            ],
            [0],
            group_size=1,
            first_group=0,
            noise=Noise(0, "train"),
            engine=engine,
            tail=TailCut(
                LongTailConfig(),
                [],
                [0],
                replica=0,
                num_replicas=1,
                group_size=1,
                num_wanted=1,
            ),
            on_progress=lambda done, total: None,
            on_finished=lambda rollout: 1 / 0,  # pyright: ignore[reportArgumentType]
        )
        generation.run(greedy(4), None, rank=0, replica=0)


HANGS = """
import os, sys
from pathlib import Path
sys.path[:0] = {path!r}
from test_stall_watch import Engine, generate, limit_of

def hangs(engine):
    {hang}

generate(Engine(hangs), limit_of(Path({folder!r}), 1.0, {times}))
print("came back")
"""


@pytest.mark.parametrize("kind", ["retries", "keeps the interpreter"])
def test_a_call_that_cannot_be_interrupted_ends_the_process(kind: str, tmp_path: Path):
    hang = {
        "retries": (
            "import time\n    while True:\n        try:\n            time.sleep(1)\n"
            "        except Exception:\n            pass"
        ),
        # PyDLL does not let other threads run meanwhile.
        "keeps the interpreter": "import ctypes\n    ctypes.PyDLL(None).sleep(1000)",
    }[kind]
    folder = tmp_path / "run"
    here = Path(__file__).parent
    code = HANGS.format(
        path=[str(here), str(here.parents[1])],
        folder=str(folder),
        times="grace_seconds=0.2" if kind == "retries" else "margin_seconds=6, grace_seconds=0.2",
        hang=hang,
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS
    )
    assert ended.returncode == 1 and "came back" not in ended.stdout
    assert "in hangs" in ended.stderr
    if kind == "retries":
        path = folder / "stalled_rank_00004.txt"
        assert "in hangs" in path.read_text()
        assert (
            "the rollout engine of rank 4 hangs: no token for 1.2 s (rollout.stall_timeout_seconds "
            f"1), and it cannot be interrupted; its stacks are in {path}; goes on from step 7"
        ) in ended.stderr
