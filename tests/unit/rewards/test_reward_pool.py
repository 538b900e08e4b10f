"""What rewards can do to the processes that run them, and that it costs their own entries alone.

Every way to end a worker, with the counters that follow; what is left behind after a kill, a crash
of the trainer, and 200 steps: nothing. Not covered: an exhausted machine (no processes, no memory).
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from suite_helpers import HERE, is_running, mine, reward, rollout, score, suite, wait_until

from gdpo_megatron.config.sandbox import SandboxConfig
from gdpo_megatron.config.schema import RewardSuiteConfig
from gdpo_megatron.rewards.scores import RewardScores
from gdpo_megatron.rewards.suite import RewardSuite


def test_what_ends_a_worker_costs_its_own_entry_alone():
    reasons = {
        "segfault": "worker died of SIGSEGV: Fatal Python error: Segmentation fault",
        "leave": "worker exited with 7",
        "kill": "worker died of SIGKILL",
        "bomb": "memory limit: its worker came to more than 400 MiB",
        "scribble": "wrote to the suite's pipe",
    }
    texts = ["fine", "fork", *(text for name in reasons for text in (name, "fine"))]
    scores = score_beside_others(texts, reasons)
    assert scores.num_invalid["ends"] == {
        "worker died of SIGSEGV": 1, "worker exited with 7": 1, "worker died of SIGKILL": 1,
        "memory limit": 1, "wrote to the suite's pipe": 1,
    }  # fmt: skip
    # Any of them might be the fault of an earlier call.
    assert scores.report.num_retries == 5
    assert scores.report.num_restarts == 2 * 5
    # Where it was, for who has to mend it.
    assert "in ends" in scores.reasons[texts.index("segfault"), "ends"]


def test_a_call_that_never_returns_costs_its_own_entry_alone(told: None):
    reasons = dict.fromkeys(("hang", "deaf"), "sample timeout: no result within 600 s")
    texts = ["fine", "hang", "fine", "deaf", "fine", "fine"]
    scores = score_beside_others(texts, reasons)
    assert scores.num_invalid["ends"] == {"sample timeout": 2}
    assert scores.report.num_timeouts("ends") == 2
    assert scores.report.num_retries == 0  # a call over its time is its own fault
    assert scores.report.num_restarts == 2


def test_the_time_of_a_call_is_that_of_the_clock():
    """And not only what these tests' calls say of it."""
    scores = score(reward("ends"), texts=["hang", "deaf"], sample_timeout_seconds=0.5)
    assert scores.num_invalid["ends"] == {"sample timeout": 2}
    assert scores.reasons[0, "ends"] == "sample timeout: no result within 0.5 s"


def score_beside_others(texts: Sequence[str], reasons: Mapping[str, str]) -> RewardScores:
    """Scores of `ends` between two others, which keep theirs; only `reasons` costs an entry."""
    scores = score(
        mine("before", "one"),
        reward("ends"),
        mine("after", "one"),
        texts=texts,
        worker_memory_mb=400,
    )
    assert scores.valid[:, 0].all() and scores.valid[:, 2].all()
    found = {texts[row]: reason.partition("\n")[0] for (row, _), reason in scores.reasons.items()}
    assert found == reasons
    assert scores.valid[:, 1].tolist() == [text not in reasons for text in texts]
    assert (scores.values[scores.valid[:, 1], 1] == 2.0).all()
    return scores


def test_a_call_that_its_worker_took_along_is_made_once_more(tmp_path: Path):
    scores = score(
        reward("once", args={"folder": str(tmp_path)}), reward("one"), texts=["x1", "2", "x3", "4"]
    )
    assert scores.values.tolist() == [[3.0, 1.0]] * 4
    assert (scores.report.num_retries, scores.report.num_restarts) == (2, 2)


def test_a_batch_call_has_the_time_of_its_samples(told: None):
    """Three samples at ten minutes: a group that takes 20 is in time."""
    settings: dict[str, Any] = {"group_size": 3, "sample_timeout_seconds": 600.0}
    single = score(mine("slow", "takes"), texts=["590", "1200"], **settings)
    assert single.reasons == {(1, "slow"): "sample timeout: no result within 600 s"}
    texts = ["1200", "a", "b", "1810", "a", "b"]
    scores = score(mine("slow", "takes_batch"), texts=texts, **settings)
    assert scores.valid[:, 0].tolist() == [True] * 3 + [False] * 3
    assert scores.reasons[3, "slow"] == "sample timeout: no result within 1800 s"


def test_async_calls_that_only_wait_are_cancelled_alone(told: None):
    texts = ["fine", "hang", "exit", "own timeout", "fine"]
    scores = score(reward("waits"), texts=texts)
    assert scores.valid[:, 0].tolist() == [True, False, False, False, True]
    assert scores.num_invalid["waits"] == {
        "sample timeout": 1, "raised SystemExit": 1, "raised TimeoutError": 1,
    }  # fmt: skip
    assert scores.report.num_restarts == scores.report.num_retries == 0


def test_the_time_of_an_async_call_is_that_of_the_clock():
    scores = score(reward("waits"), texts=["hang", "hang"], sample_timeout_seconds=0.5)
    assert scores.num_invalid["waits"] == {"sample timeout": 2}
    assert scores.report.num_restarts == scores.report.num_retries == 0


@pytest.mark.parametrize(
    ("culprit", "reason"),
    [("block", "blocked the event loop"), ("stubborn", "sample timeout")],
)
def test_an_async_call_that_takes_its_loop_along_is_found(told: None, culprit: str, reason: str):
    texts = ["hang" if culprit == "block" else "fine", culprit, *["fine"] * 6]
    scores = score(reward("waits"), texts=texts, max_concurrent_async=4)
    assert scores.valid[:, 0].tolist() == [text == "fine" for text in texts]
    assert scores.num_invalid["waits"].get(reason) == 1
    assert scores.report.num_restarts == 1


def test_leaks_cost_nothing_while_they_are_small():
    texts = [str(i) for i in range(80)]
    scores = score(
        reward("leaks", args={"mib": 8}), texts=texts, num_workers=1, worker_memory_mb=400
    )
    assert scores.values[:, 0].tolist() == [float(text) for text in texts]
    assert scores.report.num_recycled >= 1
    assert scores.report.num_restarts == scores.report.num_retries == 0


def test_who_is_killed_for_the_leak_of_others_is_called_again():
    texts = [str(i) for i in range(12)]
    scores = score(
        reward("leaks", args={"mib": 150}), texts=texts, num_workers=1, worker_memory_mb=400
    )
    assert scores.values[:, 0].tolist() == [float(text) for text in texts]
    report = scores.report
    assert report.num_restarts + report.num_recycled >= 2
    assert report.num_retries == report.num_restarts


def test_a_worker_that_leaves_files_open_is_replaced():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        scores = score(reward("leaks_files", args={"num": 90}), texts=list("012345"), num_workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert scores.valid.all() and scores.report.num_recycled >= 2


def test_the_step_ends_in_time(told: None):
    texts = ["x", "x", "stuck", "x", "stuck", "stuck"]
    with suite(
        reward("gets_stuck"), reward("one"), reward("waits"), num_workers=1,
        step_timeout_seconds=1000.0,
    ) as running:  # fmt: skip
        for _ in range(2):  # afterwards all is as before
            for sample_id, text in enumerate(texts):
                running.submit(rollout(sample_id, text))
            scores = running.collect()
            assert scores.valid[:, 0].tolist() == [True, True, False, False, False, False]
            assert scores.valid[:, 1].tolist() == [True, True, False, False, False, False]
            assert scores.valid[:, 2].all()
            assert scores.num_invalid["gets_stuck"] == {"step timeout": 4}
            assert scores.report.num_timeouts("one") == 4
            assert scores.report.num_restarts == 1


def test_the_time_of_a_step_is_that_of_the_clock():
    with suite(reward("gets_stuck"), num_workers=1, step_timeout_seconds=0.5) as running:
        running.submit(rollout(0, "stuck"))
        scores = running.collect()
    assert scores.num_invalid["gets_stuck"] == {"step timeout": 1}
    assert scores.report.wait_seconds >= 0.5


def test_state_starts_anew_when_its_worker_is_killed(told: None):
    texts = ["a", "b", "hang", "d", "e", "f"]
    scores = score(reward("countdown"), texts=texts)
    assert scores.values[[0, 1, 3, 4, 5], 0].tolist() == [1.0, 2.0, 1.0, 2.0, 3.0]
    assert scores.num_invalid["countdown"] == {"sample timeout": 1}
    assert scores.report.num_restarts == 1


def test_what_rewards_print_goes_to_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    log = tmp_path / "run" / "rewards_0.log"
    with suite(reward("prints"), log_path=log) as running:
        assert not log.parent.exists()
        running.submit(rollout(0, "x"))
        assert running.collect().valid.all()
        lines = {"out x", "err x", "child x"}
        wait_until(lambda: log.exists() and set(log.read_text().split("\n")) >= lines, "no log")
    assert capfd.readouterr() == ("", "")


def test_workers_are_clean_and_know_the_sandbox():
    with RewardSuite(
        [reward("heavy_modules"), reward("threads"), reward("sandbox_memory")],
        group_size=2,
        sandbox=SandboxConfig(memory_mb=77),
        base_dir=HERE,
    ) as running:
        running.submit(rollout(0))
        assert running.collect().values.tolist() == [[0.0, 1.0, 77.0]]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("raise RuntimeError('no model here')", "InputError.*no model here"),
        ("os.write(2, b'cannot'); os._exit(5)", "exited with 5 before it was ready; .*\ncannot"),
    ],
)
def test_a_worker_that_cannot_start_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, complaint: str
):
    monkeypatch.setenv("TEST_TRAINER", str(os.getpid()))
    (tmp_path / "mine.py").write_text(
        f"import os\nif os.environ['TEST_TRAINER'] != str(os.getpid()):\n    {line}\n"
        "def one(sample):\n    return 1.0\n"
    )
    with RewardSuite([reward("one", "./mine.py:one")], group_size=1, base_dir=tmp_path) as running:
        running.submit(rollout(0))
        with pytest.raises(RuntimeError, match=complaint):
            running.collect()


# ---- what is left --------------------------------------------------------------------------------


def noted(folder: Path, text: str) -> list[int]:
    """Ids that `starts_others` noted for a sample: child, child in a session of its own, itself."""
    names = [folder / f"{text}_{part}" for part in ("0", "1", "own")]
    wait_until(lambda: all(it.exists() and it.read_text() for it in names), "nothing was started")
    return [int(name.read_text()) for name in names]


def test_a_killed_call_takes_along_what_it_started(told: None, tmp_path: Path):
    others = reward("starts_others", args={"folder": str(tmp_path)})
    with suite(others, num_workers=1) as running:
        running.submit(rollout(0, "hangs"))
        assert running.collect().num_invalid["starts_others"] == {"sample timeout": 1}
        assert [pid for pid in noted(tmp_path, "hangs") if is_running(pid)] == []


def test_closing_ends_what_rewards_left_running(tmp_path: Path):
    before = below(os.getpid())
    with suite(reward("starts_others", args={"folder": str(tmp_path)}), reward("waits")) as running:
        running.submit(rollout(0, "returns"))
        assert running.collect().valid.all()
        pids = noted(tmp_path, "returns")
        assert all(map(is_running, pids))
        running.submit(rollout(0, "hang"))  # is not waited for
        noted(tmp_path, "hang")
    assert [pid for pid in pids if is_running(pid)] == []
    assert below(os.getpid()) <= before


TRAINER = """
import sys, time
sys.path[:0] = [{here!r}, {tests!r}]
from suite_helpers import reward, rollout, suite
running = suite(reward("starts_others", args={{"folder": {folder!r}}}), reward("waits"))
running.submit(rollout(0, "hang"))
running.submit(rollout(1, "returns"))
time.sleep(1000)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_killed_trainer(tmp_path: Path, number: signal.Signals):
    code = TRAINER.format(here=str(HERE), tests=str(HERE.parents[1]), folder=str(tmp_path))
    trainer = subprocess.Popen([sys.executable, "-c", code])
    try:
        pids = noted(tmp_path, "hang") + noted(tmp_path, "returns")
        family = psutil.Process(trainer.pid).children(recursive=True)
        assert len(family) >= 8  # pool, three workers, four that they started
        pids += [process.pid for process in family]
        trainer.send_signal(number)
        assert trainer.wait(120) == -number
        wait_until(lambda: not any(map(is_running, pids)), "processes are left")
    finally:
        trainer.kill()
        trainer.wait()


def test_without_its_pool_the_suite_says_so_and_the_workers_go():
    with suite(reward("waits"), reward("own_pid")) as running:
        running.submit(rollout(0, "fine"))
        worker = int(running.collect().values[0, 1])
        assert running._pool is not None
        running.submit(rollout(0, "hang"))
        os.kill(running._pool.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="the reward pool has ended with status -9"):
            running.collect()
        wait_until(lambda: not is_running(worker), "a worker outlives its pool")


def test_a_worker_that_is_killed_while_idle_is_replaced():
    with suite(reward("own_pid"), num_workers=1) as running:
        running.submit(rollout(0))
        pid = int(running.collect().values[0, 0])
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_running(pid), "still there")
        running.submit(rollout(0))
        scores = running.collect()
    assert scores.valid.all() and scores.values[0, 0] != pid


def below(pid: int) -> set[int]:
    """Ids of the processes that descend from one; other tests may have left some."""
    return {child.pid for child in psutil.Process(pid).children(recursive=True)}


def num_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def test_200_steps_leave_nothing_behind():
    before = below(os.getpid())
    with RewardSuite(
        [reward("one"), reward("rank"), reward("later"), reward("countdown"), reward("faulty")],
        group_size=2,
        config=RewardSuiteConfig(num_workers=2),
        base_dir=HERE,
    ) as running:
        sizes: list[list[int]] = []
        pids: list[set[int]] = []
        for step in range(200):
            for sample_id in range(4):
                running.submit(rollout(sample_id, str(sample_id)))
            scores = running.collect()
            assert scores.valid[:, :4].all() and not scores.valid[:, 4].any()
            assert scores.values[:, 3].tolist() == [4.0 * step + i + 1 for i in range(4)]
            if step in (20, 199):
                family = below(os.getpid()) - before
                pids.append(family)
                sizes.append([num_files(pid) for pid in (os.getpid(), *sorted(family))])
    assert pids[0] == pids[1] and sizes[0] == sizes[1]
    open_files = num_files(os.getpid())
    for _ in range(5):
        with suite(reward("one")) as running:
            running.submit(rollout(0))
            running.collect()
    assert num_files(os.getpid()) == open_files and below(os.getpid()) <= before
