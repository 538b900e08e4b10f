"""A run that is interrupted and goes on ends where one that was left alone ends.

The rewards are those of a file beside the config: one that says nothing about half of the rows, one
that raises on some, and one that holds the third step until it is told to go on, so that the
Ctrl-C arrives in the middle of it. Not covered: other layouts after the break (tests/distributed).
"""

from __future__ import annotations

import json
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.jobs import Ended, cli, read_jsonl, run_job, running

from gdpo_megatron.config import yaml_text

pytestmark = pytest.mark.distributed

NUM_STEPS = 6
P, G = 4, 4
NUM_REPLICAS = 2

REWARD_FILE = f"""
import time
from pathlib import Path
from gdpo_megatron.rewards import NOT_APPLICABLE

CALLS = [0]  # of this worker, the only one of its engine

def letters(sample, per):
    CALLS[0] += 1
    go = Path(__file__).with_name("go")
    while CALLS[0] > 2 * {P * G // NUM_REPLICAS} and not go.exists():
        time.sleep(0.02)
    return sum(c.isalpha() for c in sample.completion) / per

def only_even(sample):
    if sample.metadata["number"] % 2:
        return NOT_APPLICABLE
    return float(sample.completion.count("e"))

def fragile(sample):
    if sample.metadata["number"] % 3 == 0:
        raise ValueError("cannot judge this")
    return 1.0 / sample.num_tokens
"""

# What a clock, a machine or the age of a process decides: the first syncs of one are checked.
OF_THE_CLOCK = re.compile(
    "time/|memory/|rollout/tokens_per_second|reward/.*/seconds|reward_suite/|weight_sync/"
)


@dataclass(frozen=True)
class Runs:
    """An interrupted run that went on, and one that was left alone."""

    folder: Path
    stopped: Ended
    files_when_stopped: dict[str, Any]
    resumed: Ended
    whole: Ended


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, quickstart: Path) -> Runs:
    folder = tmp_path_factory.mktemp("interruption")
    (folder / "reward.py").write_text(REWARD_FILE)
    prompts = read_jsonl(quickstart / "train.jsonl")[:24]
    rows = [{"prompt": it["prompt"], "number": n} for n, it in enumerate(prompts)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(it)}\n" for it in rows))
    config = {
        "run_dir": "run",
        "model": {
            "hf_path": str(quickstart / "model"),
            "init": "random",
            "max_sequence_length": 112,
        },
        "data": {"train": "rows.jsonl", "answer_key": None},
        "rewards": [
            {"name": "letters", "type": "./reward.py:letters", "args": {"per": 10}},
            {"name": "only_even", "type": "./reward.py:only_even", "weight": 0.5},
            {"name": "fragile", "type": "./reward.py:fragile"},
        ],
        # One reward fails on a third of the prompts, in some steps on most.
        "reward_suite": {
            "num_workers": 1,
            "sample_timeout_seconds": 120,
            "max_invalid_fraction": 1.0,
        },
        "rollout": {"num_prompts_per_step": P, "group_size": G, "max_completion_tokens": 16},
        "train": {"num_steps": NUM_STEPS, "num_minibatches_per_step": 2},
        "optimizer": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 4},
        "parallel": {"tensor_model_parallel_size": 2},
        "logging": {"tensorboard": False},
    }
    path = folder / "config.yaml"
    path.write_text(yaml_text.dump(config))
    with running(cli("train", path, "--nproc", "2")) as job:
        job.wait_for(f"step 2/{NUM_STEPS}")
        job.process.send_signal(signal.SIGINT)
        job.wait_for("finishing the step and saving")
        time.sleep(3)  # the signal is passed on within 0.2 s; later, a later step is saved
        (folder / "go").touch()
        stopped = job.wait()
    run_dir = folder / "run"
    files = {
        "checkpoints": [it.name for it in (run_dir / "checkpoints").iterdir()],
        "steps": [it["step"] for it in read_jsonl(run_dir / "metrics.jsonl")],
        "exported": (run_dir / "hf").exists(),
    }
    return Runs(
        folder=folder,
        stopped=stopped,
        files_when_stopped=files,
        resumed=run_job("train", path, "--nproc", "2"),
        whole=run_job("train", path, "--nproc", "2", "--run_dir", "whole"),
    )


def saved_step(runs: Runs) -> int:
    (name,) = runs.files_when_stopped["checkpoints"]
    return int(name.removeprefix("step_"))


def test_ctrl_c_saves_and_says_so(runs: Runs):
    assert runs.stopped.code == 130, runs.stopped.output
    step = saved_step(runs)
    assert 3 <= step < NUM_STEPS
    assert f"interrupted and saved after step {step}" in runs.stopped.output
    assert runs.files_when_stopped["steps"] == list(range(1, step + 1))
    assert not runs.files_when_stopped["exported"]
    # The traceback of the reward that raises, told once; none of ranks that were torn down.
    assert runs.stopped.output.count("reward 'fragile' raised") == 1
    assert runs.stopped.output.count("Traceback") == 1
    assert "ChildFailedError" not in runs.stopped.output


def test_the_same_command_goes_on_at_the_right_step(runs: Runs):
    assert runs.resumed.code == 0, runs.resumed.output
    step = saved_step(runs)
    assert f"resumed after step {step}" in runs.resumed.output
    assert f"step {step}/{NUM_STEPS}" not in runs.resumed.output
    assert f"step {step + 1}/{NUM_STEPS}" in runs.resumed.output
    assert "changed since" not in runs.resumed.output


def test_both_runs_have_the_same_metrics(runs: Runs):
    """Every value of every step but those of clock and memory, to 1e-6; rewards exactly."""
    assert runs.whole.code == 0, runs.whole.output
    broken = read_jsonl(runs.folder / "run/metrics.jsonl")
    whole = read_jsonl(runs.folder / "whole/metrics.jsonl")
    assert [it["step"] for it in broken] == [it["step"] for it in whole] == [1, 2, 3, 4, 5, 6]
    compared = 0
    for a, b in zip(broken, whole, strict=True):
        names = {it for it in a.keys() | b.keys() if not OF_THE_CLOCK.match(it)}
        for name in names:
            if name.startswith(("reward/", "completion/", "run/")):
                assert a[name] == b[name], name
            else:
                assert a[name] == pytest.approx(b[name], rel=1e-6, abs=1e-12), name
        compared += len(names)
    assert compared > 200
    # The learning rate follows the schedule of the whole run, not of what was left of it.
    rates = [it["optimizer/lr"] for it in broken]
    assert rates[:2] == pytest.approx([0.5e-3, 1e-3])
    assert rates[1:] == sorted(rates[1:], reverse=True) and rates[-1] < 0.1e-3


def test_both_runs_make_the_same_completions_and_weights(runs: Runs):
    for step in range(1, NUM_STEPS + 1):
        name = f"rollouts/step_{step:06d}.jsonl"
        a, b = (read_jsonl(runs.folder / run / name) for run in ("run", "whole"))
        assert [it["completion"] for it in a] == [it["completion"] for it in b]
        assert [it["rewards"] for it in a] == [it["rewards"] for it in b]
    a, b = (load_file(runs.folder / run / "hf/model.safetensors") for run in ("run", "whole"))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-7, msg=name)


def test_rows_that_a_reward_cannot_or_does_not_judge_are_counted(runs: Runs):
    """A reward that raises makes its rows invalid; the step goes on with the other rewards."""
    metrics = read_jsonl(runs.folder / "whole/metrics.jsonl")
    for it in metrics:
        for name in ("letters", "only_even", "fragile"):
            missing = it[f"reward/{name}/invalid"] + it[f"reward/{name}/not_applicable"]
            assert missing % G == 0 and 0 <= missing <= P * G
        assert it["reward/letters/invalid"] == it["reward/letters/not_applicable"] == 0
        assert it["reward/only_even/invalid"] == it["reward/fragile/not_applicable"] == 0
        assert it["update/loss"] is not None
    # 24 rows are one epoch of 6 steps: each number once.
    assert sum(it["reward/only_even/not_applicable"] for it in metrics) == 12 * G
    assert sum(it["reward/fragile/invalid"] for it in metrics) == 8 * G
    seen = {"only_even": set[str](), "fragile": set[str]()}
    for step in range(1, NUM_STEPS + 1):
        for it in read_jsonl(runs.folder / f"whole/rollouts/step_{step:06d}.jsonl"):
            for name, why in it.get("unscored", {}).items():
                assert it["rewards"][name] is None
                seen[name].add(why)
    assert any("cannot judge this" in why for why in seen["fragile"])
    assert len(seen["only_even"]) == 1 and "not applicable" in seen["only_even"].pop()
