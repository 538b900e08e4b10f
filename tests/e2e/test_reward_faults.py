"""Real runs whose rewards misbehave: one that hangs on a sample, one that breaks and is mended.

One rank; what several engines do with their faults is in tests/unit/rewards (reports added up) and
in test_interruption.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import told_time
from support.jobs import cli, read_jsonl, run_job, running
from support.told_suite import POOL_COMMAND

from gdpo_megatron.config import yaml_text

P, G = 4, 4

REWARD_FILE = f"""
import os, sys, time
from pathlib import Path

# Where the trainer looks the rewards up: its pool is to be the one with the time that is told.
if "{told_time.FOLDER}" in os.environ and "gdpo_megatron.rewards.suite" in sys.modules:
    sys.modules["gdpo_megatron.rewards.suite"].POOL_COMMAND = {POOL_COMMAND!r}

FOLDER = Path(__file__).parent
CALLS = [0]

def letters(sample):
    return float(sum(c.isalpha() for c in sample.completion))

def hangs_once(sample):
    try:
        os.close(os.open(FOLDER / "hung", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return 1.0 / sample.num_tokens
    print("this one hangs")
    from support import told_time
    told_time.say(told_time.FOREVER)
    time.sleep(1000)

def breaks(sample):
    # In the third step, with the only worker; and on the evaluation of a config that says so.
    CALLS[0] += 1
    if CALLS[0] > {2 * P * G} and not (FOLDER / "mended").exists():
        raise ConnectionError("no answer from the judge")
    return float(sample.completion.count("e"))
"""


def make_run(folder: Path, quickstart: Path, reward: str, **changes: Any) -> Path:
    """Config of a run with `letters` and another reward of the file."""
    (folder / "reward.py").write_text(REWARD_FILE)
    prompts = read_jsonl(quickstart / "train.jsonl")[:24]
    rows = "".join(json.dumps({"prompt": it["prompt"]}) + "\n" for it in prompts)
    (folder / "rows.jsonl").write_text(rows)
    config: dict[str, Any] = {
        "run_dir": "run",
        "model": {
            "hf_path": str(quickstart / "model"),
            "init": "random",
            "max_sequence_length": 112,
        },
        "data": {"train": "rows.jsonl", "eval": "rows.jsonl", "answer_key": None},
        "rewards": [
            {"name": "letters", "type": "./reward.py:letters", "args": {}},
            {"name": reward, "type": f"./reward.py:{reward}"},
        ],
        "rollout": {"num_prompts_per_step": P, "group_size": G, "max_completion_tokens": 12},
        "eval": {"max_completion_tokens": 8, "allow_train_overlap": True},
        "reward_suite": {"num_workers": 1, "sample_timeout_seconds": 600},
        "train": {"num_steps": 4},
        "checkpoint": {"save_interval": 0, "export_hf": False},
        "logging": {"tensorboard": False},
    }
    path = folder / "config.yaml"
    path.write_text(yaml_text.dump(config | changes))
    return path


@pytest.mark.distributed
def test_a_reward_that_hangs_on_one_sample_costs_that_entry(tmp_path: Path, quickstart: Path):
    path = make_run(tmp_path, quickstart, "hangs_once", train={"num_steps": 3})
    (tmp_path / "told").mkdir()
    with running(cli("train", path), **{told_time.FOLDER: str(tmp_path / "told")}) as job:
        ended = job.wait()
    assert ended.code == 0, ended.output
    metrics = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert [it["step"] for it in metrics] == [1, 2, 3]
    assert [it["reward/hangs_once/invalid"] for it in metrics] == [1, 0, 0]
    assert [it["reward/hangs_once/timeouts"] for it in metrics] == [1, 0, 0]
    assert [it["reward_suite/num_restarts"] for it in metrics] == [1, 0, 0]
    assert [it["reward_suite/num_retries"] for it in metrics] == [0, 0, 0]
    for it in metrics:
        assert it["reward/letters/invalid"] == 0 and it["reward/letters/seconds"] > 0
        assert it["update/num_loss_rows"] == P * G
    assert "this one hangs" not in ended.output
    assert (tmp_path / "run/rewards_0.log").read_text() == "this one hangs\n"


@pytest.mark.distributed
def test_a_broken_reward_stops_the_run_which_goes_on_when_it_is_mended(
    tmp_path: Path, quickstart: Path
):
    path = make_run(tmp_path, quickstart, "breaks")
    broken = run_job("train", path)
    assert broken.code == 2, broken.output
    for part in (
        "reward 'breaks': 16 of 16 rows are invalid, more than reward_suite.max_invalid_fraction "
        "0.5 allows: raised ConnectionError (16)",
        "ConnectionError: no answer from the judge",
        "the run is saved after step 2; the same command goes on there",
    ):
        assert part in broken.output
    run = tmp_path / "run"
    assert [it["step"] for it in read_jsonl(run / "metrics.jsonl")] == [1, 2]
    assert [it.name for it in (run / "checkpoints").iterdir()] == ["step_00000002"]

    (tmp_path / "mended").touch()
    resumed = run_job("train", path)
    assert resumed.code == 0, resumed.output
    whole = run_job("train", path, "--run_dir", "whole")
    assert whole.code == 0, whole.output
    # The prompts of the step that was stopped are drawn again, and nothing was learned from it.
    a, b = (read_jsonl(tmp_path / it / "metrics.jsonl") for it in ("run", "whole"))
    for name in ("reward/breaks/mean", "reward/letters/mean", "update/loss", "rollout/num_tokens"):
        assert [it[name] for it in a] == pytest.approx([it[name] for it in b], rel=1e-6), name
    assert [it["step"] for it in a] == [1, 2, 3, 4]


@pytest.mark.distributed
def test_an_evaluation_with_a_broken_reward_stops_too(tmp_path: Path, quickstart: Path):
    path = make_run(
        tmp_path,
        quickstart,
        "breaks",
        eval={
            "max_completion_tokens": 8,
            "num_prompts": 24,
            "samples_per_prompt": 4,
            "allow_train_overlap": True,
        },
        train={"num_steps": 2, "eval_interval": 1},
        reward_suite={
            "num_workers": 1,
            "max_invalid_fraction": 0.25,
            "sample_timeout_seconds": 600,
        },
    )
    during = run_job("train", path)
    assert during.code == 2, during.output
    assert "reward 'breaks': 64 of 96 rows are invalid" in during.output
    assert "the run is saved after step 1" in during.output
    assert [it["step"] for it in read_jsonl(tmp_path / "run/metrics.jsonl")] == [1]
    alone = run_job("eval", path, "--run_dir", "eval")
    assert alone.code == 2, alone.output
    assert "reward 'breaks': 64 of 96 rows are invalid" in alone.output
    assert not list((tmp_path / "eval").rglob("results.json"))
