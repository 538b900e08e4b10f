"""Training with vLLM as the engine, by the command that users type.

The canary, in each step here, says whether the engine's log-probs are the policy's. Not covered:
several nodes, GPUs; the layouts are in test_vllm_sync.py.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
from support.engines import engine_setup
from support.jobs import read_jsonl, succeed

from gdpo_megatron.certify.family_models import MODELS, save_model
from gdpo_megatron.config import yaml_text
from gdpo_megatron.errors import InputError
from gdpo_megatron.rollout.base import engines

pytestmark = [pytest.mark.distributed, pytest.mark.vllm]

REWARDS = ("format", "correctness")
ALWAYS = {"checksum_interval": 1, "canary": {"interval": 1}}


def train(quickstart: Path, name: str, model: dict[str, Any], **sections: Any) -> list[dict]:
    """Metrics of a run of two ranks; runs of one name share their folder."""
    config = {
        "run_dir": name,
        "model": {"max_sequence_length": 160, **model},
        "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
        "rewards": [{"name": reward, "type": f"tool_call_{reward}"} for reward in REWARDS],
        "weight_sync": ALWAYS,
        "logging": {"tensorboard": False},
        **sections,
    }
    (quickstart / f"{name}.yaml").write_text(yaml_text.dump(config))
    succeed("train", quickstart / f"{name}.yaml", "--nproc", "2")
    return read_jsonl(quickstart / name / "metrics.jsonl")


def test_an_engine_over_both_ranks_of_two_stages(quickstart: Path):
    metrics = train(
        quickstart,
        "vllm",
        {"hf_path": "model", "init": "random"},
        # Random text has no format, but differs in how often a character is followed by another.
        rewards=[
            {
                "name": "repetition",
                "type": "repetition",
                "args": {"ngram_size": 2, "unit": "character"},
            }
        ],
        parallel={"pipeline_model_parallel_size": 2},
        rollout={
            "engine": "vllm",
            "tensor_parallel_size": 2,
            "vllm": {"kv_cache_gib": 0.25},
            "num_prompts_per_step": 4,
            "group_size": 4,
            "max_completion_tokens": 24,
        },
        eval={"max_completion_tokens": 16, "num_prompts": 4},
        train={"num_steps": 3, "eval_interval": 3},
        optimizer={"lr": 1e-3},
    )
    assert [it["run/policy_version"] for it in metrics] == [0, 1, 2]
    for it in metrics:
        assert it["rollout/num_tokens"] > 0 and it["optimizer/grad_norm"] > 0
        assert it["update/mismatch_abs_diff_max"] < 1e-4
        assert 0 < it["weight_sync/canary_max_logprob_diff"] < 1e-4
        assert it["weight_sync/num_checksums"] > it["weight_sync/num_resident"] > 0
    assert "eval/repetition/mean" in metrics[-1]


def test_a_head_size_that_its_attention_does_not_take(stories_folder: Path):
    with pytest.raises(InputError, match=r"heads of size 32, .*this model's have size 8; use nat"):
        engines.get("vllm")(engine_setup(stories_folder))


def test_a_mixture_of_experts(tmp_path: Path):
    """vLLM would start with it, and answer with other weights than the sync brought."""
    save_model(tmp_path, **MODELS["mixtral"], head_dim=32)
    with pytest.raises(InputError, match="does not take a sync of a mixture of experts"):
        engines.get("vllm")(engine_setup(tmp_path))


@pytest.mark.full
def test_rewards_rise_as_with_the_native_engine(quickstart: Path):
    """30 steps of the quickstart's task from one start; other noise, so within noise."""
    sft = {
        "run_dir": "warm",
        "model": {"hf_path": "model", "init": "random", "max_sequence_length": 160},
        "data": {"train": "sft.jsonl"},
        "train": {"num_steps": 200, "global_batch_size": 64, "micro_batch_size": 32},
        "optimizer": {"lr": 3e-3, "min_lr": 3e-4, "schedule": "cosine", "warmup_steps": 30},
        "logging": {"tensorboard": False},
    }
    (quickstart / "warm.yaml").write_text(yaml_text.dump(sft))
    succeed("sft", quickstart / "warm.yaml", "--nproc", "2")
    rises: dict[str, dict[str, float]] = {}
    for engine in ("native", "vllm"):
        metrics = train(
            quickstart,
            f"thirty_{engine}",
            {"hf_path": "warm/hf"},
            rollout={
                "engine": engine,
                "num_prompts_per_step": 16,
                "group_size": 8,
                "max_completion_tokens": 48,
            },
            eval={"max_completion_tokens": 48},
            train={"num_steps": 30, "num_minibatches_per_step": 2, "micro_batch_size": 32},
            optimizer={"lr": 1e-4, "weight_decay": 0.0},
        )
        rises[engine] = {}
        for reward in REWARDS:
            values = [it[f"reward/{reward}/mean"] for it in metrics]
            early, late = statistics.fmean(values[:5]), statistics.fmean(values[-5:])
            rises[engine][reward] = late - early
        assert max(it["update/mismatch_abs_diff_max"] for it in metrics) < 1e-4
    print(rises)
    for reward, spread in {"format": 0.2, "correctness": 0.6}.items():
        assert rises["native"][reward] > 0 and rises["vllm"][reward] > 0
        assert abs(rises["native"][reward] - rises["vllm"][reward]) < spread
