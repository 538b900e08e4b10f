"""Packing and token budgets from the command line: the same run, less work.

Same seed, so the same rollouts in step 1. In step 2 weights differ by rounding, and so may a token:
only step 1 is compared. The numbers themselves: tests/distributed/test_batching_layouts.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.assets import needed
from support.jobs import read_jsonl, succeed

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]


def _train(run_dir: Path, **train: Any) -> list[dict[str, Any]]:
    settings = {
        "run_dir": run_dir,
        "train.num_steps": 2,
        "rollout.num_prompts_per_step": 4,
        "rollout.group_size": 4,
        "loss.kl_coef": 0.1,  # the reference is packed too
        "checkpoint.export_hf": "false",
        **{f"train.{name}": value for name, value in train.items()},
    }
    words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    succeed("train", ROOT / "examples/stories/gdpo.yaml", "--nproc", "2", *words)
    return read_jsonl(run_dir / "metrics.jsonl")


def test_train(tmp_path: Path):
    needed("models/stories260K")
    padded = _train(tmp_path / "padded", micro_batch_size=8)
    packed = _train(tmp_path / "packed", packing="true", max_tokens_per_micro_batch=300)
    assert len(packed) == 2
    assert packed[0]["rollout/num_tokens"] == padded[0]["rollout/num_tokens"]
    for name in ("update/loss", "update/kl", "update/entropy", "optimizer/grad_norm"):
        assert packed[0][name] == pytest.approx(padded[0][name], rel=1e-4, abs=1e-6), name
    assert [step["update/padding_share"] for step in packed] == [0, 0]
    assert padded[0]["update/padding_share"] > 0


def test_sft(quickstart: Path, sft: Path):
    """Against the session's run of 16 rows a micro-batch."""
    words = ("--run_dir", "sft_packed", "--train.packing", "true", "--train.num_steps", "3")
    budget = ("--train.max_tokens_per_micro_batch", "400")
    succeed("sft", quickstart / "sft.yaml", "--nproc", "2", *words, *budget)
    packed = read_jsonl(quickstart / "sft_packed/metrics.jsonl")
    padded = read_jsonl(sft / "metrics.jsonl")
    assert len(packed) == 3
    for ours, theirs in zip(packed, padded, strict=False):
        assert ours["sft/loss"] == pytest.approx(theirs["sft/loss"], rel=1e-4)
        assert ours["sft/padding_share"] == 0 < theirs["sft/padding_share"]
    assert packed[0]["optimizer/grad_norm"] == pytest.approx(
        padded[0]["optimizer/grad_norm"], rel=1e-4
    )
