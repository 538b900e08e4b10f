"""Rollouts on disk, read back by hand-written expectation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from gdpo_megatron.observability.rollout_log import write_rollouts
from gdpo_megatron.types import Completion, Prompt, RewardMatrix, Rollout


def rollout(group_id: int, sample_id: int, text: str) -> Rollout:
    return Rollout(
        group_id=group_id,
        sample_id=sample_id,
        prompt=Prompt(prompt_id=f"rows.jsonl:{group_id}", token_ids=(1, 2), text="Sag \u00fc:"),
        completion=Completion(
            token_ids=(5, 6, 7), logprobs=(-0.1, -0.2, -0.3), text=text, finish_reason="stop"
        ),
        policy_version=4,
    )


REWARDS = RewardMatrix(
    names=("format", "correctness"),
    values=torch.tensor([[1.0, -3.0], [0.0, math.nan], [0.5, 2.0]]),
    valid=torch.tensor([[True, True], [True, False], [True, True]]),
    group_ids=torch.tensor([0, 0, 1]),
    reasons={(1, "correctness"): "bad JSON"},
)
ADVANTAGES = torch.tensor([0.25, math.inf, -0.5], dtype=torch.float64)


def test_one_readable_object_per_rollout(tmp_path: Path):
    chosen = {1: rollout(0, 1, "zwei\nZeilen"), 0: rollout(0, 0, "\u00fc")}
    path = write_rollouts(tmp_path, 10, chosen, REWARDS, ADVANTAGES)
    assert path == tmp_path / "rollouts" / "step_000010.jsonl"
    text = path.read_text(encoding="utf-8")
    assert "Sag \u00fc:" in text
    first, second = (json.loads(line) for line in text.splitlines())
    assert list(first.items()) == [
        ("step", 10),
        ("group_id", 0),
        ("sample_id", 0),
        ("prompt_id", "rows.jsonl:0"),
        ("prompt", "Sag \u00fc:"),
        ("completion", "\u00fc"),
        ("finish_reason", "stop"),
        ("num_tokens", 3),
        ("rewards", {"format": 1.0, "correctness": -3.0}),
        ("advantage", 0.25),
        ("policy_version", 4),
    ]
    assert second["completion"] == "zwei\nZeilen"
    assert second["rewards"] == {"format": 0.0, "correctness": None}
    assert second["unscored"] == {"correctness": "bad JSON"}
    assert second["advantage"] is None


def test_a_step_that_is_repeated_replaces_its_file(tmp_path: Path):
    write_rollouts(tmp_path, 1, {0: rollout(0, 0, "a"), 1: rollout(0, 1, "b")}, REWARDS, ADVANTAGES)
    path = write_rollouts(tmp_path, 1, {2: rollout(1, 2, "c")}, REWARDS, ADVANTAGES)
    assert [json.loads(line)["completion"] for line in path.read_text().splitlines()] == ["c"]
    assert [it.name for it in path.parent.iterdir()] == ["step_000001.jsonl"]


def test_a_row_of_another_group_is_refused_and_nothing_is_written(tmp_path: Path):
    with pytest.raises(ValueError, match="row 2 is of group 1, but sample 0 of group 0"):
        write_rollouts(tmp_path, 1, {2: rollout(0, 0, "a")}, REWARDS, ADVANTAGES)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_rollouts(tmp_path, 1, {0: rollout(0, 0, "old")}, REWARDS, ADVANTAGES)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_rollouts(tmp_path, 1, {0: rollout(0, 0, "new")}, REWARDS, ADVANTAGES)
    assert json.loads(path.read_text())["completion"] == "old"
    assert [it.name for it in path.parent.iterdir()] == ["step_000001.jsonl"]
