"""What certify says of run folders: two that should be one run, and one that should have learned.

The folders are written by hand. Real runs: tests/e2e/test_certify_run.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gdpo_megatron.certify import training
from gdpo_megatron.certify.check import Measured
from gdpo_megatron.certify.problems import make_rows
from gdpo_megatron.certify.resume import NUM_STEPS, compare_runs
from gdpo_megatron.config import yaml_text
from gdpo_megatron.config.loader import load_config
from gdpo_megatron.config.schema import RLConfig, SFTConfig
from gdpo_megatron.rewards.builtin.gsm8k import (
    correctness_reward,
    format_reward,
    integer_reward,
)


def bad(measured: list[Measured]) -> list[str]:
    return [it.name for it in measured if not it.good]


# ---- two runs ------------------------------------------------------------------------------------


def write_run(folder: Path, seconds: float) -> None:
    (folder / "rollouts").mkdir(parents=True)
    (folder / "hf").mkdir()
    steps = [
        {
            "step": n,
            "time/step_seconds": seconds,
            **{f"update/value_{i}": n + i / 7 for i in range(24)},
        }
        for n in range(1, NUM_STEPS + 1)
    ]
    write_steps(folder, steps)
    for n in range(1, NUM_STEPS + 1):
        rows = [{"completion": f"{n} {i}", "rewards": {"letters": i / 10}} for i in range(3)]
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        (folder / f"rollouts/step_{n:06d}.jsonl").write_text(text)
    save_file({"a": np.ones((3, 2), "f4")}, folder / "hf/model.safetensors")


def write_steps(folder: Path, steps: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(it)}\n" for it in steps))


def read_steps(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(it) for it in (folder / "metrics.jsonl").read_text().splitlines()]


def from_the_start(folder: Path) -> None:
    """Not resumed: the steps before the kill are there twice."""
    steps = read_steps(folder)
    write_steps(folder, steps[:3] + steps)


def another_value(folder: Path) -> None:
    steps = read_steps(folder)
    steps[4]["update/value_7"] *= 1 + 1e-4
    write_steps(folder, steps)


def value_missing(folder: Path) -> None:
    steps = read_steps(folder)
    del steps[5]["update/value_7"]
    write_steps(folder, steps)


def another_completion(folder: Path) -> None:
    path = folder / "rollouts/step_000005.jsonl"
    path.write_text(path.read_text().replace("5 2", "5 3"))


def another_weight(folder: Path) -> None:
    path = folder / "hf/model.safetensors"
    tensors = load_file(path)
    tensors["a"][2, 1] += 1e-4
    save_file(tensors, path)


SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "from the start": (from_the_start, "steps logged"),
    "another value": (another_value, "largest difference of a metric"),
    "value missing": (value_missing, "largest difference of a metric"),
    "another completion": (another_completion, "completions that differ"),
    "another weight": (another_weight, "largest difference of a weight"),
}


def test_runs_that_are_one(tmp_path: Path) -> None:
    write_run(tmp_path / "run", seconds=1.0)
    write_run(tmp_path / "whole", seconds=2.0)
    assert bad(compare_runs(tmp_path / "run", tmp_path / "whole")) == []


@pytest.mark.parametrize("name", SPOILT)
def test_runs_that_are_not(name: str, tmp_path: Path) -> None:
    spoil, said = SPOILT[name]
    write_run(tmp_path / "run", seconds=1.0)
    write_run(tmp_path / "whole", seconds=1.0)
    spoil(tmp_path / "run")
    assert said in bad(compare_runs(tmp_path / "run", tmp_path / "whole"))


# ---- a run that learns ---------------------------------------------------------------------------


def steps_of(**rewards: list[float]) -> list[dict[str, Any]]:
    return [
        {
            "update/mismatch_abs_diff_max": 1e-6,
            "update/loss": 0.1,
            **{f"reward/{name}/mean": values[n] for name, values in rewards.items()},
        }
        for n in range(training.NUM_STEPS)
    ]


def middle(reward: str, where: str) -> float:
    low, high = training.BANDS[f"{reward}, {where} {training.NUM_ENDS} steps"]
    return (low + high) / 2


def within_bands() -> dict[str, list[float]]:
    half = training.NUM_STEPS // 2
    return {
        reward: [middle(reward, "first")] * half + [middle(reward, "last")] * half
        for reward in training.REWARDS
    }


def test_a_run_within_its_bands() -> None:
    assert bad(training.against_bands(steps_of(**within_bands()))) == []


def test_a_run_that_learns_nothing() -> None:
    rewards = within_bands()
    rewards["format"] = [middle("format", "first")] * training.NUM_STEPS
    assert bad(training.against_bands(steps_of(**rewards))) == ["format, last 3 steps"]


def test_a_run_of_an_engine_that_is_another_model() -> None:
    steps = steps_of(**within_bands())
    steps[3]["update/mismatch_abs_diff_max"] = 0.1
    steps[5]["update/loss"] = float("nan")
    assert bad(training.against_bands(steps)) == [
        "numbers that are not finite",
        "log-probs of engine and trainer",
    ]


def test_a_run_that_ended_early() -> None:
    assert "steps" in bad(training.against_bands(steps_of(**within_bands())[:7]))


def test_the_problems_are_right_and_half_of_the_answers_are_not() -> None:
    """By the rewards themselves; of four rows two are right, one lacks a tag, one is no number."""
    rows = make_rows(seed=0)
    right = [correctness_reward(it["completion"], it["answer"]) for it in rows]
    assert right[:4] == [1.0, 1.0, 1.0, 0.0] and sum(right) == 0.75 * len(rows)
    assert sum(format_reward(it["completion"]) for it in rows) == 0.75 * len(rows)
    assert sum(integer_reward(it["completion"]) for it in rows) == 0.75 * len(rows)
    assert all(0 <= int(it["answer"]) <= 9 for it in rows)
    assert make_rows(seed=0) == rows != make_rows(seed=1)


def test_the_configs_are_those_of_a_run(tmp_path: Path) -> None:
    for root, config in (
        (SFTConfig, training.sft_config(1)),
        (RLConfig, training.gdpo_config(1)),
        (RLConfig, training.model_config(tmp_path, tmp_path / "rows.jsonl")),
    ):
        path = tmp_path / "config.yaml"
        path.write_text(yaml_text.dump(config))
        load_config(root, path)
