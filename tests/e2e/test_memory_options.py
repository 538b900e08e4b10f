"""The `memory` keys through the command line: many of them together, and the run is the same run.

Two steps of the stories example on two ranks, with a KL term so that there is a reference, and
fine-tuning. What the keys save is in tests/distributed/test_memory.py, and so are the layouts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.assets import ASSETS, needed
from support.jobs import succeed

ROOT = Path(__file__).parents[2]
STEPS = {
    "train.num_steps": 2,
    "rollout.num_prompts_per_step": 4,
    "rollout.group_size": 4,
    "rollout.max_completion_tokens": 40,
    "train.micro_batch_size": 4,
    "loss.kl_coef": 0.1,
    "checkpoint.export_hf": "false",
}
KEYS: dict[str, object] = {
    "memory.recompute_granularity": "selective",
    "memory.recompute_modules": "[mlp]",
    "memory.logprob_chunk_tokens": 50,
    "memory.free_grad_buffers_during_rollout": "true",
    "memory.reference": "swap",
}
NUMBERS = ("update/", "optimizer/", "advantage/")
"""What a run computes; the others are times, or follow from rewards."""


def train(folder: Path, options: dict[str, object]) -> list[dict[str, float]]:
    """Metrics of the steps."""
    needed("models/stories260K")
    settings = {**STEPS, "run_dir": folder, **options}
    command = [sys.executable, "-m", "gdpo_megatron.cli", "train", "examples/stories/gdpo.yaml"]
    command += ["--nproc", "2"]
    command += [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    environment = {**os.environ, "GDPO_ASSETS": str(ASSETS), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return metrics(folder)


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.distributed
def test_the_same_run(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", {})
    # Stopped and resumed: the reference is still what the first step started from.
    train(tmp_path / "saving", {**KEYS, "train.num_steps": 1})
    saving = train(tmp_path / "saving", KEYS)
    assert [step["update/kl"] > 0 for step in saving] == [True, True]
    for mine, right in zip(saving, plain, strict=True):
        assert mine.keys() == right.keys()
        numbers = [name for name in right if name.startswith(NUMBERS)]
        assert {"update/loss", "update/kl", "optimizer/grad_norm"} <= set(numbers)
        for name in numbers:
            assert mine[name] == pytest.approx(right[name], rel=1e-4, abs=1e-5), name


@pytest.mark.distributed
def test_the_same_fine_tuning(quickstart: Path, sft: Path) -> None:
    """The keys that sft has, in another layout than the run that they are compared with."""
    keys = {
        "memory.recompute_granularity": "full",
        "memory.recompute_method": "block",
        "memory.recompute_num_layers": 1,
        "memory.logprob_chunk_tokens": 100,
        "parallel.pipeline_model_parallel_size": 2,
        "run_dir": "sft_memory",
        "train.num_steps": 3,
        "checkpoint.export_hf": "false",
    }
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    succeed("sft", quickstart / "sft.yaml", "--nproc", "2", *words)
    saving, plain = (
        [step["sft/loss"] for step in metrics(folder)]
        for folder in (quickstart / "sft_memory", sft)
    )
    assert saving == pytest.approx(plain[:3], rel=1e-4)
