"""The search of layouts: what it may choose from, against numbers worked out by hand.

Not covered: that the fastest layout of the plan is the fastest one of a real cluster.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.plan_jobs import plan_job

from gdpo_megatron.config.schema import RLConfig
from gdpo_megatron.errors import InputError
from gdpo_megatron.planning.job import Job
from gdpo_megatron.planning.machine import GPUS, Assumptions
from gdpo_megatron.planning.memory import engine_working_bytes, memory_plan, sync_bytes
from gdpo_megatron.planning.search import evened_out, search
from gdpo_megatron.planning.step_time import head_layers, slowest_stage_share

MOE = "Qwen3-235B-A22B"
VLLM: dict[str, Any] = {
    "rollout": {"engine": "vllm", "vllm": {"kv_cache_gib": 8.0}, "max_completion_tokens": 3072}
}


def _rl(job: Job) -> RLConfig:
    assert isinstance(job.config, RLConfig)
    return job.config


def test_the_head_is_worth_layers(tmp_path: Path):
    job = plan_job(tmp_path, MOE, 64, {"parallel": {"pipeline_model_parallel_size": 8}})
    # q and o, k and v, the router, 8 of the experts; norms of q and k, of attention and MLP.
    layer = 2 * 8192 * 4096 + 2 * 512 * 4096 + 128 * 4096 + 8 * 3 * 4096 * 1536 + 2 * 128 + 2 * 4096
    head = 151936 * 4096
    assert head_layers(job) == pytest.approx(head / layer, rel=1e-3)  # 2.79; the final norm
    assert job.stage_layers == [12] * 6 + [11] * 2
    # 11 layers and the head would be 13.79; with 10 they are 12.79, and 84 are 7 x 12.
    assert evened_out(job) == "Et*12|t*12|t*12|t*12|t*12|t*12|t*12|t*10L"
    assert slowest_stage_share(job) == pytest.approx(13.79 / 96.79, rel=1e-3)
    parallel = replace(job.config.parallel, pipeline_model_parallel_layout=evened_out(job))
    even = replace(job, config=replace(job.config, parallel=parallel))
    assert slowest_stage_share(even) == pytest.approx(12.79 / 96.79, rel=1e-3)
    assert evened_out(even) is None


def test_one_stage_has_everything(tmp_path: Path):
    job = plan_job(tmp_path, "Qwen2.5-7B", 8)
    assert evened_out(job) is None and slowest_stage_share(job) == 1


def test_an_engine_may_repeat_key_value_heads(tmp_path: Path):
    """Of which 235B-A22B has 4; the native engine has none to spare, nor has vLLM for 6 ranks."""

    def job(engine: str, size: int, folder: str) -> Job:
        rollout = {"engine": engine, "tensor_parallel_size": size, "max_completion_tokens": 3072}
        return plan_job(tmp_path / folder, MOE, 3 * size, {"rollout": rollout})

    assert job("vllm", 16, "a").world_size == 48
    with pytest.raises(InputError, match="16 does not divide the model's 4 key/value heads"):
        job("native", 16, "b")
    with pytest.raises(InputError, match="6 does not divide the model's 4 key/value heads"):
        job("vllm", 6, "c")
    with pytest.raises(InputError, match="128 does not divide the model's 64 attention heads"):
        job("vllm", 128, "d")


def test_an_engine_gets_the_cache_that_there_is_room_for(tmp_path: Path):
    given, gpu = Assumptions(), GPUS["h100-80"]
    job = plan_job(tmp_path, "Qwen2.5-7B", 8, VLLM)
    found = search(job, gpu, 8, given)
    assert found.fitting
    for plan in found.fitting:
        rollout = _rl(plan.job).rollout
        assert rollout.vllm is not None and plan.memory.peak_bytes <= plan.limit_bytes
        # 16 groups of 8 on 8 / TP engines, 4096 tokens each, of 28 layers and 4 heads of 128.
        rows = 16 * 8 * rollout.tensor_parallel_size
        needed = min(256, rows) * 4096 * 2 * 28 * (4 // rollout.tensor_parallel_size) * 128 * 2
        cache = rollout.vllm.kv_cache_gib * 2**30
        assert cache < needed + 2**30
        room = plan.limit_bytes - sum(plan.memory.phases["rollout"].values())
        assert cache >= needed or room < 2**30
    assert {_rl(plan.job).rollout.tensor_parallel_size for plan in found.fitting} == {1, 2, 4}


def test_the_nearest_is_told_where_none_fits(tmp_path: Path):
    found = search(plan_job(tmp_path, "Llama-3.1-70B", 8, VLLM), GPUS["h100-80"], 8, Assumptions())
    assert not found.fitting and found.nearest is not None and not found.nearest.fits
    # On 8 GPUs, 16 bytes a parameter beside what an engine holds, however it is cut.
    assert found.nearest.memory.peak_bytes > 16 * 70_553_706_496 // 8


def test_engines_over_several_nodes(tmp_path: Path):
    """235B-A22B fits 128 H100 with engines of 16 GPUs, and not with any of fewer."""
    memory = {
        "reference": "swap",
        "free_grad_buffers_during_rollout": True,
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
        "logprob_chunk_tokens": 1024,
    }
    job = plan_job(tmp_path, MOE, 128, {**VLLM, "memory": memory, "loss": {"kl_coef": 0.1}})
    found = search(job, GPUS["h100-80"], 8, Assumptions())
    assert {_rl(plan.job).rollout.tensor_parallel_size for plan in found.fitting} == {16, 32, 64}
    best = found.fitting[0].memory
    # 2 bytes of 235,093,634,560 parameters on 16 GPUs; the reference waits elsewhere.
    assert best.phases["rollout"]["engine weights"] == 2 * 235_093_634_560 // 16
    assert best.host_bytes > 0 and "reference" not in best.phases["rollout"]


def test_memory_of_an_engine_at_work(tmp_path: Path):
    sizes = {"tensor_parallel_size": 2, **VLLM["rollout"]}
    layout = {"tensor_model_parallel_size": 2}
    job = plan_job(tmp_path / "a", "Qwen2.5-7B", 8, {"rollout": sizes, "parallel": layout})
    # 16384 tokens of three hidden states and three halves of an MLP's columns; 256 rows of words.
    working = 16384 * (3 * 3584 + 3 * 18944 // 2) * 2 + 256 * 152064 * 10
    assert engine_working_bytes(job, _rl(job)) == working
    assert memory_plan(job).phases["rollout"]["activations"] == working
    # An MLP's halves are held until both are there; buckets are as large as the vocabulary.
    vocabulary = 152064 * 3584 * 2
    held = 2 * 18944 * 3584 * 2
    assert sync_bytes(job, _rl(job)) == held + vocabulary + vocabulary // 2 + vocabulary
    native = plan_job(tmp_path / "b", "Qwen2.5-7B", 8, {"parallel": layout})
    assert engine_working_bytes(native, _rl(native)) == 0
    assert sync_bytes(native, _rl(native)) == vocabulary + vocabulary // 2 + vocabulary


def test_a_swapped_reference_of_experts(tmp_path: Path):
    """Each rank keeps what it updates: of experts a part among fewer ranks than of the rest."""
    layout = {"expert_model_parallel_size": 8}
    config = {"parallel": layout, "memory": {"reference": "swap"}, "loss": {"kl_coef": 0.1}}
    plan = memory_plan(plan_job(tmp_path, "Qwen3-30B-A3B-Instruct-2507", 16, config))
    experts = 48 * 128 * 3 * 2048 * 768
    dense = 30_532_122_624 - experts
    # All dense parameters over 16 ranks, an eighth of the experts over 2.
    assert plan.host_bytes == pytest.approx(2 * (dense / 16 + experts / 8 / 2), rel=1e-4)
