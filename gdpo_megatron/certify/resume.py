"""A run that is killed and goes on ends where one that was left alone ends.

Six steps, a checkpoint after every second. A reward of the run's own holds the fourth step until
the whole job is killed with SIGKILL, so it dies in the middle of a rollout. The same command then
goes on from the second step. What the project promises, and tests on CPUs, is one run: the same
completions, every metric but clocks and memory within 1e-6, the same weights within 1e-6.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gdpo_megatron.certify.check import CheckFailed, Findings, Measured
from gdpo_megatron.certify.job import Job, cli
from gdpo_megatron.certify.problems import (
    MAX_SEQUENCE_LENGTH,
    write_config,
    write_problems,
)

NUM_STEPS, SAVE_INTERVAL, HELD_STEP = 6, 2, 4
CLOSE = 1e-6
"""How near metrics and weights have to be, relative to max(1, |value|)."""

_PROMPTS, _GROUP = 4, 4

# What a clock, a machine or the age of a process decides: the first syncs of one are checked.
_OF_THE_CLOCK = re.compile(
    "time/|memory/|rollout/tokens_per_second|reward/.*/seconds|reward_suite/|weight_sync/|plan/"
)

# A file named `hold` beside it makes it wait in its held call, and say so; it waits to be killed.
_REWARD = """
import time
from pathlib import Path

FOLDER = Path(__file__).parent
CALLS = [0]  # of this worker, the only one of its engine


def letters(sample, held_call):
    CALLS[0] += 1
    if CALLS[0] == held_call and (FOLDER / "hold").exists():
        (FOLDER / "held").touch()
        while True:
            time.sleep(1)
    return sum(c.isalpha() for c in sample.completion) / 10
"""


def run(job: Job) -> Findings:
    """Kill, resume, and compare with a run that was left alone."""
    num_ranks = min(2, job.situation.num_devices)
    write_problems(job.folder)
    (job.folder / "reward.py").write_text(_REWARD, encoding="utf-8")
    path = write_config(job.folder / "config.yaml", config(num_ranks))
    words = ("train", path, "--nproc", str(num_ranks))
    (job.folder / "hold").touch()
    with job.started(cli(*words)) as running:
        running.wait_until((job.folder / "held").exists, f"step {HELD_STEP}")
        running.kill()
    (job.folder / "hold").unlink()
    steps = len(_lines(job.folder / "run/metrics.jsonl"))
    said = job.command(*words)
    job.command(*words, "--run_dir", "whole")
    resumed = re.search(r"resumed after step (\d+)", said)
    if resumed is None:
        raise CheckFailed("the second start did not say 'resumed after step N'")
    return Findings(
        measured=[
            Measured("steps of the run that was killed", steps, "==", HELD_STEP - 1),
            Measured("goes on after step", int(resumed[1]), "==", SAVE_INTERVAL),
            *compare_runs(job.folder / "run", job.folder / "whole"),
        ]
    )


def config(num_ranks: int) -> dict[str, Any]:
    """Of the run: sampled rollouts, two updates a step, a schedule that is not flat."""
    calls_of_a_step = _PROMPTS * _GROUP // num_ranks
    held_call = (HELD_STEP - 1) * calls_of_a_step + 1
    return {
        "run_dir": "run",
        "model": {
            "hf_path": "model",
            "init": "random",
            "max_sequence_length": MAX_SEQUENCE_LENGTH,
        },
        "data": {"train": "train.jsonl"},
        "rewards": [
            {"name": "letters", "type": "./reward.py:letters", "args": {"held_call": held_call}}
        ],
        "reward_suite": {"num_workers": 1, "sample_timeout_seconds": 86400},
        "rollout": {
            "num_prompts_per_step": _PROMPTS,
            "group_size": _GROUP,
            "max_completion_tokens": 12,
        },
        "train": {"num_steps": NUM_STEPS, "num_minibatches_per_step": 2},
        "optimizer": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 4},
        "parallel": {"tensor_model_parallel_size": num_ranks},
        "checkpoint": {"save_interval": SAVE_INTERVAL},
        "logging": {"tensorboard": False},
    }


def compare_runs(broken: Path, whole: Path) -> list[Measured]:
    """How far two run folders are apart."""
    metrics = [_lines(folder / "metrics.jsonl") for folder in (broken, whole)]
    steps = [[row["step"] for row in rows] for rows in metrics]
    values = [
        _apart(row.get(name), other.get(name))
        for row, other in zip(*metrics, strict=False)
        for name in row.keys() | other.keys()
        if not _OF_THE_CLOCK.match(name)
    ]
    texts = [list(_completions(folder)) for folder in (broken, whole)]
    different = sum(a != b for a, b in zip(*texts, strict=False))
    return [
        Measured("steps logged", len(steps[0]), "==", NUM_STEPS),
        Measured("steps logged twice, or others", int(steps[0] != steps[1]), "==", 0),
        Measured("largest difference of a metric", max(values, default=math.inf), "<=", CLOSE),
        Measured("metrics compared", len(values), ">=", 20 * NUM_STEPS),
        Measured("completions logged", len(texts[0]), "==", len(texts[1])),
        Measured("completions that differ", different, "==", 0),
        Measured("largest difference of a weight", _of_weights(broken, whole), "<=", CLOSE),
    ]


def _apart(a: Any, b: Any) -> float:
    """Distance relative to max(1, |b|); infinite where one of them is missing."""
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    return abs(a - b) / max(1.0, abs(b))


def _completions(run_dir: Path) -> Iterator[tuple[str, Any]]:
    """(text, rewards) of every completion in the folder, in order."""
    for path in sorted((run_dir / "rollouts").glob("step_*.jsonl")):
        yield from ((row["completion"], row["rewards"]) for row in _lines(path))


def _of_weights(broken: Path, whole: Path) -> float:
    from safetensors.numpy import load_file

    one, other = (load_file(it / "hf/model.safetensors") for it in (broken, whole))
    if one.keys() != other.keys():
        return math.inf
    return max(float(abs(one[name] - other[name]).max()) for name in other)


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
