"""Each task on its real data: `examples/cpu/run.py` from the assets to trained steps and a table.

On every change two steps from random weights, on one rank, which writes nothing that any reward
likes; with --full five steps after a warm start, on two ranks, where rewards differ. Not covered:
that rewards rise, which docs/tasks.md shows for one run of each.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from support.assets import ASSETS, needed
from support.jobs import read_jsonl, running

pytestmark = pytest.mark.distributed

RUN = Path(__file__).resolve().parents[2] / "examples/cpu/run.py"

TASKS: dict[str, tuple[tuple[str, ...], dict[str, tuple[float, float]]]] = {
    "tool_calling": (("toolrl",), {"format": (0, 1), "correctness": (-3, 3)}),
    "gsm8k": (("gsm8k",), {"correctness": (0, 1), "integer": (0, 1), "format": (0, 1)}),
    "math": (("math",), {"correctness": (0, 1), "length": (0, 1)}),
    "code": (
        ("code_contests_small",),
        {"pass_rate": (0, 1), "length": (0, 1), "bug_free": (0, 1)},
    ),
    "mixed": (
        ("toolrl", "math"),
        {"format": (0, 1), "calls": (-3, 3), "correctness": (0, 1), "length": (0, 1)},
    ),
}
"""Task -> data sets, and the range of each reward."""


def run(task: str, folder: Path, *words: str) -> tuple[str, list[dict[str, Any]]]:
    """(output, metrics of the steps) of a task."""
    for data in TASKS[task][0]:
        needed(f"data/{data}")
    command = [sys.executable, str(RUN), task, "--assets", str(ASSETS), "--out", str(folder)]
    with running([*command, *words]) as job:
        ended = job.wait()
    assert ended.code == 0, ended.output[-4000:]
    return ended.output, read_jsonl(folder / task / "gdpo/metrics.jsonl")


def check_metrics(task: str, metrics: list[dict[str, Any]], steps: int) -> None:
    assert [it["step"] for it in metrics] == list(range(1, steps + 1))
    for it in metrics:
        for reward, (low, high) in TASKS[task][1].items():
            assert low <= it[f"reward/{reward}/mean"] <= high
        assert all(value is None or math.isfinite(value) for value in it.values())


def check_mixed_rows(folder: Path) -> None:
    """A row of a mixed set was scored by the rewards that it names and by no other."""
    prepared = [json.loads(it) for it in (folder / "train.jsonl").read_text().splitlines()]
    rewards_of = {row["id"]: row["rewards"] for row in prepared}
    seen: set[tuple[str, ...]] = set()
    for path in (folder / "gdpo/rollouts").iterdir():
        for row in read_jsonl(path):
            scored = [name for name, value in row["rewards"].items() if value is not None]
            assert scored == rewards_of[row["prompt_id"]]
            seen.add(tuple(scored))
    assert seen == {("format", "calls"), ("correctness", "length")}


@pytest.mark.parametrize("task", TASKS)
def test_task_trains_from_random_weights(task: str, tmp_path: Path):
    small = ("--rollout.num_prompts_per_step", "6", "--train.num_minibatches_per_step", "2")
    small += ("--rollout.group_size", "4", "--rollout.max_completion_tokens", "32")
    small += ("--logging.tensorboard", "false", "--logging.num_rollout_groups", "6")
    output, metrics = run(
        task, tmp_path, "--steps", "2", "--sft-steps", "0", "--nproc", "1", *small
    )
    check_metrics(task, metrics, 2)
    header = "| step | " + " | ".join([*TASKS[task][1], "tokens", "seconds"]) + " |"
    assert header in output
    if task == "mixed":
        check_mixed_rows(tmp_path / task)


@pytest.mark.full
@pytest.mark.parametrize("task", TASKS)
def test_task_trains_after_a_warm_start(task: str, tmp_path: Path):
    output, metrics = run(task, tmp_path)
    check_metrics(task, metrics, 5)
    assert "| 5 | " in output
    if task == "tool_calling":
        assert metrics[-1]["reward/correctness/mean"] > -3
    if task in ("gsm8k", "math", "code"):
        graded = {"gsm8k": "format", "math": "length", "code": "bug_free"}[task]
        assert max(it[f"reward/{graded}/mean"] for it in metrics) > 0.2
