"""Real runs in FP8: a check passes; a sabotaged scale stops the run, which is saved, or is left.

One rank; layouts and the check itself are in tests/distributed/test_fp8.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from support.jobs import Ended, read_jsonl, running
from support.ports import group_of_one

from gdpo_megatron.config import yaml_text

# A worker whose scales use a hundred-thousandth of the range, once the file `sabotage` is there.
WORKER = """
import os, runpy, sys
from pathlib import Path

if __name__ == "__main__":
    os.environ |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    from gdpo_megatron.policy import fp8

    original, sabotage = fp8.scale_of, Path(__file__).with_name("sabotage")
    fp8.scale_of = lambda *args: original(*args) * (1e-5 if sabotage.exists() else 1.0)
    runpy.run_module("gdpo_megatron.worker", run_name="__main__")
"""


def make_run(folder: Path, quickstart: Path, **check: Any) -> None:
    (folder / "worker.py").write_text(WORKER)
    common: dict[str, Any] = {
        "model": {
            "hf_path": str(quickstart / "model"),
            "init": "random",
            "max_sequence_length": 160,
        },
        "precision": {"fp8": {"backend": "scaled_mm", "parity_check": {"every": 2, **check}}},
        "checkpoint": {"save_interval": 0, "export_hf": False},
        "logging": {"tensorboard": False},
    }
    train = common | {
        "run_dir": "run",
        "data": {"train": str(quickstart / "train.jsonl")},
        "rewards": [{"name": "short", "type": "length", "args": {"limit": 8}}],
        "rollout": {"num_prompts_per_step": 2, "group_size": 4, "max_completion_tokens": 12},
        "loss": {"kl_coef": 0.01},
        "train": {"num_steps": 2},
    }
    sft = common | {
        "run_dir": "sft_run",
        "data": {"train": str(quickstart / "sft.jsonl")},
        "train": {"num_steps": 2, "global_batch_size": 4},
    }
    (folder / "train.yaml").write_text(yaml_text.dump(train))
    (folder / "sft.yaml").write_text(yaml_text.dump(sft))


def run(folder: Path, job: str, *overrides: str) -> Ended:
    _store, described = group_of_one()
    command = [sys.executable, str(folder / "worker.py"), job, str(folder / f"{job}.yaml")]
    with running([*command, *overrides], **described) as worker:
        return worker.wait()


@pytest.mark.distributed
@pytest.mark.parametrize(("job", "run_dir"), [("train", "run"), ("sft", "sft_run")])
def test_a_sabotaged_scale_stops_the_run(
    job: str, run_dir: str, tmp_path: Path, quickstart: Path
) -> None:
    """After two right steps; mended, the same command goes on with the step that was stopped."""
    make_run(tmp_path, quickstart)
    right = run(tmp_path, job)
    assert right.code == 0, right.output
    folder = tmp_path / run_dir
    first, second = read_jsonl(folder / "metrics.jsonl")
    assert first["fp8/active"] == second["fp8/active"] == 1.0
    assert first["fp8/max_logprob_diff"] > 0 and first["fp8/grad_cosine"] > 0.95
    assert "fp8/grad_cosine" not in second

    (tmp_path / "sabotage").touch()
    longer = ("--train.num_steps", "4", "--run_dir", run_dir)
    stopped = run(tmp_path, job, *longer)
    assert stopped.code == 2, stopped.output
    assert "precision.fp8.parity_check: with FP8 and without, " in stopped.output
    assert "the run is saved after step 2; the same command goes on there" in stopped.output
    assert "Traceback" not in stopped.output
    third = read_jsonl(folder / "metrics.jsonl")[2]
    assert third["step"] == 3 and third["fp8/grad_cosine"] < 0.95
    assert [it.name for it in (folder / "checkpoints").iterdir()] == ["step_00000002"]

    (tmp_path / "sabotage").unlink()
    mended = run(tmp_path, job, *longer)
    assert mended.code == 0, mended.output
    metrics = read_jsonl(folder / "metrics.jsonl")
    assert [it["step"] for it in metrics] == [1, 2, 3, 4]
    assert metrics[2]["fp8/grad_cosine"] > 0.95


@pytest.mark.distributed
def test_falling_back_lasts(tmp_path: Path, quickstart: Path) -> None:
    """The step that falls back is all without FP8: its ratio is 1, and the reference agrees."""
    make_run(tmp_path, quickstart, on_failure="fall_back")
    (tmp_path / "sabotage").touch()
    fell_back = run(tmp_path, "train")
    assert fell_back.code == 0, fell_back.output
    assert "the run goes on without FP8" in fell_back.output
    first, second = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert first["fp8/active"] == second["fp8/active"] == 0.0
    assert first["fp8/grad_cosine"] < 0.95 and "fp8/grad_cosine" not in second
    for step in (first, second):
        assert step["update/ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert first["update/kl"] == pytest.approx(0.0, abs=1e-6)
    (tmp_path / "sabotage").unlink()
    resumed = run(tmp_path, "train", "--train.num_steps", "3")
    assert resumed.code == 0, resumed.output
    assert [it["fp8/active"] for it in read_jsonl(tmp_path / "run/metrics.jsonl")] == [0, 0, 0]
