"""Training on several turns, on two ranks: one run, any layout, the same numbers.

That the model's tokens alone are trained on shows in the log-probs: the trainer's, of the tokens
under the loss mask, are the engine's. Nothing is learned in two steps; examples/calculator learns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.jobs import read_jsonl, succeed

from gdpo_megatron.config import yaml_text

pytestmark = pytest.mark.distributed

ENVIRONMENTS = Path(__file__).parents[1] / "unit/rollout/episode_environments.py"
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "tp2": {
        "parallel": {"tensor_model_parallel_size": 2},
        "rollout": {"tensor_parallel_size": 2},
    },
    "pp2 packed": {
        "parallel": {"pipeline_model_parallel_size": 2},
        "train": {"packing": True, "max_tokens_per_micro_batch": 300},
    },
}


def config(name: str) -> dict[str, Any]:
    turn = {"name": "length", "reduce": "last"}
    whole: dict[str, Any] = {
        "run_dir": name,
        "model": {"hf_path": "sft/hf", "max_sequence_length": 160},
        "data": {"train": "train.jsonl"},
        "rewards": [
            {"name": "turns", "type": "environment", "args": {"name": "turn", "reduce": "max"}},
            {"name": "last", "type": "environment", "args": turn},
        ],
        "rollout": {
            "num_prompts_per_step": 4,
            "group_size": 4,
            "max_completion_tokens": 88,
            "stop_token_ids": list(range(0, 780, 12)),
            "environment": {"type": f"{ENVIRONMENTS}:Echo", "max_turns": 6},
        },
        "train": {"num_steps": 2},
        "optimizer": {"lr": 1e-3},
        "loss": {"kl_coef": 0.01},
        "checkpoint": {"export_hf": False},
        "logging": {"tensorboard": False},
    }
    for section, values in LAYOUTS[name].items():
        whole[section] = whole.get(section, {}) | values
    return whole


def test_every_layout_trains_on_the_same_turns(quickstart: Path, sft: Path):
    runs: dict[str, list[dict[str, float]]] = {}
    texts: dict[str, Any] = {}
    for name in LAYOUTS:
        path = quickstart / f"{name}.yaml"
        path.write_text(yaml_text.dump(config(name)))
        succeed("train", path, "--nproc", "2")
        runs[name] = read_jsonl(quickstart / name / "metrics.jsonl")
        rollouts = read_jsonl(quickstart / name / "rollouts/step_000001.jsonl")
        assert [len(it["turns"]) > 1 for it in rollouts].count(True) > 1
        texts[name] = [it["turns"] for it in rollouts if it["group_id"] == 0]
    first, *others = runs.values()
    for run in runs.values():
        for step in run:
            assert step["environment/mean_turns"] > 2 and step["environment/num_faults"] == 0
            assert step["update/mismatch_abs_diff_max"] < 2e-4
            assert step["update/num_loss_tokens"] == pytest.approx(
                16 * step["completion/mean_tokens"]
            )
            assert step["environment/mean_tokens"] > 10
    for name, run in zip(list(runs)[1:], others, strict=True):
        assert texts[name] == texts["dp2"]
        for metric in ("environment/mean_tokens", "completion/mean_tokens", "reward/last/mean"):
            assert run[0][metric] == first[0][metric], (name, metric)
        for metric in ("update/loss", "optimizer/grad_norm", "update/kl"):
            assert run[0][metric] == pytest.approx(first[0][metric], rel=1e-4, abs=1e-7), metric
