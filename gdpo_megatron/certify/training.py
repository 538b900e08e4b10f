"""Short GDPO runs on GSM8K's three rewards, through `gdpo-megatron` as a user would start them.

`run_problems` needs nothing: problems and a small model made by code, a warm start by SFT, then
GDPO, held to bands that were measured with other seeds. `run_model` takes a model folder and rows.
What Qwen2.5-1.5B gains on GSM8K nobody here has measured, so that run is held to no reward: only to
what must be so whatever the model can do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gdpo_megatron.certify.check import Findings, Measured, Situation
from gdpo_megatron.certify.job import Job
from gdpo_megatron.certify.problems import (
    MAX_COMPLETION_TOKENS,
    MAX_SEQUENCE_LENGTH,
    REWARDS,
    gsm8k_rewards,
    write_config,
    write_problems,
)

SFT_STEPS, NUM_STEPS = 120, 12
NUM_ENDS = 3
"""Steps at the beginning and at the end of a run that are averaged."""

MODEL_STEPS = 2
_PROMPT_TOKENS, _COMPLETION_TOKENS = 384, 64

BANDS: Mapping[str, tuple[float, float]] = {
    "correctness, first 3 steps": (0.08, 0.40),  # (0.19 to 0.27)
    "correctness, last 3 steps": (0.08, 0.50),  # (0.16 to 0.27)
    "integer, first 3 steps": (0.55, 0.85),  # (0.67 to 0.77)
    "integer, last 3 steps": (0.78, 1.00),  # (0.88 to 0.91)
    "format, first 3 steps": (0.52, 0.80),  # (0.66 to 0.70)
    "format, last 3 steps": (0.72, 0.97),  # (0.82 to 0.85)
}
"""Band of each of `ends`; in brackets what three seeds gave, see docs/certify.md."""

Metrics = Sequence[dict[str, Any]]


def sft_config(seed: int) -> dict[str, Any]:
    """The warm start."""
    return {
        "run_dir": "sft",
        "seed": seed,
        "model": {
            "hf_path": "model",
            "init": "random",
            "max_sequence_length": MAX_SEQUENCE_LENGTH,
        },
        "data": {"train": "sft.jsonl"},
        "optimizer": {"lr": 3e-3, "min_lr": 3e-4, "schedule": "cosine", "warmup_steps": 10},
        "train": {"num_steps": SFT_STEPS, "global_batch_size": 64, "micro_batch_size": 32},
        "checkpoint": {"save_interval": 0},
        "logging": {"tensorboard": False},
    }


def gdpo_config(seed: int) -> dict[str, Any]:
    """The run itself."""
    return {
        "run_dir": "gdpo",
        "seed": seed,
        "model": {"hf_path": "sft/hf", "max_sequence_length": MAX_SEQUENCE_LENGTH},
        "data": {"train": "train.jsonl"},
        "rewards": gsm8k_rewards(),
        "rollout": {
            "num_prompts_per_step": 16,
            "group_size": 8,
            "max_completion_tokens": MAX_COMPLETION_TOKENS,
        },
        "optimizer": {"lr": 3e-4, "weight_decay": 0.0},
        "train": {"num_steps": NUM_STEPS, "num_minibatches_per_step": 2, "micro_batch_size": 32},
        "reward_suite": {"num_workers": 1, "sample_timeout_seconds": 600},
        "checkpoint": {"save_interval": 0},
        "logging": {"tensorboard": False},
    }


def run_problems(job: Job) -> Findings:
    """From random weights to a model that answers in GSM8K's form."""
    write_problems(job.folder)
    num_ranks = ("--nproc", str(min(2, job.situation.num_devices)))
    seed = 0
    job.command("sft", write_config(job.folder / "sft.yaml", sft_config(seed)), *num_ranks)
    job.command("train", write_config(job.folder / "gdpo.yaml", gdpo_config(seed)), *num_ranks)
    return Findings(measured=against_bands(read_metrics(job.folder / "gdpo")))


def against_bands(metrics: Metrics) -> list[Measured]:
    """Hold a run of `run_problems` to its bands."""
    found = ends(metrics)
    return [
        *sound(metrics, NUM_STEPS),
        *(
            Measured(name, found[name], relation, bound)
            for name, pair in BANDS.items()
            for relation, bound in zip((">=", "<="), pair, strict=True)
        ),
    ]


def ends(metrics: Metrics) -> dict[str, float]:
    """Mean of each reward over the first and the last steps."""

    def mean(steps: Metrics, reward: str) -> float:
        return sum(step[f"reward/{reward}/mean"] for step in steps) / max(1, len(steps))

    return {
        f"{reward}, {where} {NUM_ENDS} steps": mean(steps, reward)
        for reward in REWARDS
        for where, steps in (("first", metrics[:NUM_ENDS]), ("last", metrics[-NUM_ENDS:]))
    }


def sound(metrics: Metrics, num_steps: int) -> list[Measured]:
    """What holds for any run of so many steps in float32 whose engine is the trainer's model."""
    from gdpo_megatron.weight_sync.canary import TOLERANCES

    numbers = [
        value
        for step in metrics
        for name, value in step.items()
        if isinstance(value, float) and name.startswith(("update/", "optimizer/"))
    ]
    mismatch = max((step["update/mismatch_abs_diff_max"] for step in metrics), default=math.inf)
    return [
        Measured("steps", len(metrics), "==", num_steps),
        Measured(
            "numbers that are not finite", sum(not math.isfinite(it) for it in numbers), "==", 0
        ),
        Measured("log-probs of engine and trainer", mismatch, "<=", TOLERANCES["float32"].largest),
    ]


def read_metrics(run_dir: Path) -> Metrics:
    """The steps of a run."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# ---- a model of the user's -----------------------------------------------------------------------


def missing_model(situation: Situation) -> str | None:
    """A model and rows."""
    if situation.model is None or situation.data is None:
        return "needs --model FOLDER and --data FILE (of `gdpo-megatron data prepare gsm8k`)"
    return None


def run_model(job: Job) -> Findings:
    """Two steps of GDPO from a model folder, then the export against transformers."""
    situation = job.situation
    assert situation.model is not None and situation.data is not None
    num_ranks = ("--nproc", str(situation.num_devices))
    config = model_config(situation.model, situation.data)
    job.command("train", write_config(job.folder / "model.yaml", config), *num_ranks)
    metrics = read_metrics(job.folder / "run")
    job.command("verify", job.folder / "run/hf")  # fails where its logits are beyond their bound
    rewards = ", ".join(f"{name} {metrics[-1][f'reward/{name}/mean']:.3f}" for name in REWARDS)
    note = f"rewards of the last step, held to nothing: {rewards}"
    return Findings(measured=sound(metrics, MODEL_STEPS), notes=[note])


def model_config(model: Path, data: Path) -> dict[str, Any]:
    """A short run in float32, in which engine and trainer must agree to rounding."""
    return {
        "run_dir": "run",
        "model": {
            "hf_path": str(model.resolve()),
            "max_sequence_length": _PROMPT_TOKENS + _COMPLETION_TOKENS,
        },
        "data": {"train": str(data.resolve()), "max_prompt_tokens": _PROMPT_TOKENS},
        "rewards": gsm8k_rewards(),
        "rollout": {
            "num_prompts_per_step": 8,
            "group_size": 4,
            "max_completion_tokens": _COMPLETION_TOKENS,
        },
        "optimizer": {"lr": 1e-6},
        "train": {"num_steps": MODEL_STEPS, "micro_batch_size": 4},
        "reward_suite": {"num_workers": 1, "sample_timeout_seconds": 600},
        "checkpoint": {"save_interval": 0},
        "logging": {"tensorboard": False},
    }
