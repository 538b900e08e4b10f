"""The plan's arithmetic against numbers worked out by hand.

Not covered: what a GPU really takes. Activations are compared with real CPU runs and with the dry
run in test_plan_measured.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.plan_jobs import plan_job, save_job
from support.published_models import NUM_PARAMETERS

from gdpo_megatron.cli import main
from gdpo_megatron.planning.activations import norm_bytes, under_way, update_bytes
from gdpo_megatron.planning.machine import GPUS, Assumptions
from gdpo_megatron.planning.memory import memory_plan
from gdpo_megatron.planning.plan import make_plan, plan_against_measured
from gdpo_megatron.planning.search import layouts_that_fit
from gdpo_megatron.planning.state import held_by, model_parameters
from gdpo_megatron.planning.step_time import active_parameters, bubble_share, forward_flops

TP8_PP8 = {
    "tensor_model_parallel_size": 8,
    "pipeline_model_parallel_size": 8,
    "sequence_parallel": True,
}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *NUM_PARAMETERS.items(),
        # 2 * 152064 * 3584 + 28 * ((3584 + 2 * 512) * 3584 + 4608 + 3584 * 3584
        #   + 3 * 18944 * 3584 + 2 * 3584) + 3584
        ("Qwen2.5-7B", 7_615_616_512),
        # 2 * 128256 * 8192 + 80 * ((8192 + 2 * 1024) * 8192 + 8192 * 8192 + 3 * 28672 * 8192
        #   + 2 * 8192) + 8192
        ("Llama-3.1-70B", 70_553_706_496),
        ("Qwen3-235B-A22B", 235_093_634_560),
    ],
)
def test_parameters_of_published_models(tmp_path: Path, name: str, count: int):
    assert model_parameters(plan_job(tmp_path, name, 1)) == count


def test_active_parameters_of_a_mixture(tmp_path: Path):
    # 94 layers of attention (2 * 8192 * 4096 + 2 * 512 * 4096 + 2 * 128), 8 experts of
    # 3 * 1536 * 4096, router 128 * 4096, two norms; output layer 151936 * 4096, final norm.
    layer = 2 * 8192 * 4096 + 2 * 512 * 4096 + 256 + 8 * 3 * 1536 * 4096 + 128 * 4096 + 2 * 4096
    job = plan_job(tmp_path, "Qwen3-235B-A22B", 8)
    assert active_parameters(job) == 94 * layer + 151936 * 4096 + 4096
    # The name says A22B, of which the embedding, 0.6 B, is looked up and not multiplied.
    assert active_parameters(job) == pytest.approx(21.6e9, rel=0.01)


def test_state_of_70b(tmp_path: Path):
    job = plan_job(tmp_path, "Llama-3.1-70B", 1024, {"parallel": TP8_PP8})
    # 10 layers of a stage (see test_dry_run.py), and the embedding's 128256 * 8192 / 8.
    first = held_by(job, 0)
    count = 1_069_711_360 + 131_334_144
    assert first.num_parameters == count == 1_201_045_504
    assert (first.parameters, first.gradients) == (2 * count, 4 * count)
    assert first.optimizer == 12 * count // 16  # of DP 16: main weights and two moments
    assert held_by(job, 3).num_parameters == 1_069_711_360
    assert held_by(job, 7).num_parameters == count + 8192  # the final norm


def test_buffers_are_padded(tmp_path: Path):
    sizes = {
        "num_hidden_layers": 1,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "vocab_size": 10,
    }
    job = plan_job(
        tmp_path, "Llama-3.1-70B", 3, {"precision": {"params_dtype": "float32"}}, **sizes
    )
    # Embedding and output of 64 * 24 (10 rows padded), norms of 24, qkv 72 * 24, proj 24 * 24,
    # fc1 80 * 24, fc2 24 * 40. In reverse order, each from a multiple of 64 on:
    # 1536 | 24 -> 1600 | fc2 960 -> 2560 | fc1 1920 -> 4480 | norm -> 4544 | proj 576 -> 5120
    # | qkv 1728 -> 6848 | norm -> 6912 | embedding 1536 -> 8448 = 22 * lcm(3, 128).
    held = held_by(job, 0)
    assert held.num_parameters == 2 * 1536 + 3 * 24 + 960 + 1920 + 576 + 1728
    assert held.parameters == held.gradients == 4 * 8448
    # The first rank's third, 2816 elements, without the gaps of 40 and 64 - 24 in it.
    assert held.optimizer == 8 * (1536 + 24 + 960 + (2816 - 2560))


def test_bubble(tmp_path: Path):
    job = plan_job(tmp_path, "Llama-3.1-70B", 64, {"parallel": TP8_PP8})
    assert bubble_share(job, 8) == 7 / 15
    assert bubble_share(job, 57) == 7 / 64
    virtual = TP8_PP8 | {"virtual_pipeline_model_parallel_size": 5}
    job = plan_job(tmp_path, "Llama-3.1-70B", 64, {"parallel": virtual})
    assert bubble_share(job, 7 * 8) == 7 / (5 * 56 + 7)


def test_micro_batches_under_way(tmp_path: Path):
    job = plan_job(tmp_path, "Llama-3.1-70B", 64, {"parallel": TP8_PP8})
    shape = job.shape()
    assert shape.num_microbatches == 1024
    assert [under_way(job, shape, rank) for rank in (0, 3, 7)] == [[8], [5], [1]]
    virtual = TP8_PP8 | {"virtual_pipeline_model_parallel_size": 5}
    job = plan_job(tmp_path, "Llama-3.1-70B", 64, {"parallel": virtual})
    # Warm-up of 2 * 7 + 4 * 8 = 46 and one more: 8 of each chunk, again 7 of the first.
    assert under_way(job, job.shape(), 0) == [15, 8, 8, 8, 8]


def test_activations_of_one_layer(tmp_path: Path):
    sizes = {"num_hidden_layers": 1, "hidden_size": 512, "intermediate_size": 1024}
    config = {
        "model": {"hf_path": ".", "max_sequence_length": 129},
        "rollout": {"num_prompts_per_step": 1, "group_size": 2, "max_completion_tokens": 64},
        "train": {"micro_batch_size": 2},
        "precision": {"params_dtype": "float32"},
        "memory": {"logprob_chunk_tokens": 128},
    }
    job = plan_job(tmp_path, "Llama-3.1-70B", 1, config, **sizes, vocab_size=640)
    assert norm_bytes(512, 4) == 12 * 512 + 4
    tokens, q, k = 256, 512, 64
    attention = tokens * (6148 + 4 * (q + k + (q + 2 * k) + q) + 4 * 64) + 128 * 4 * 8 * 4
    mlp = tokens * (6148 + 20 * 1024)
    assert update_bytes(job, job.shape(), 0).layers == attention + mlp


def test_flops(tmp_path: Path):
    job = plan_job(tmp_path, "Llama-3.1-70B", 8)
    multiplied = 70_553_706_496 - 128256 * 8192
    # Causal attention of a row of 4096: on average 2048 keys, two products of 2 * 8192 each.
    of_row = 4096 * (2 * multiplied + 80 * 2 * 2 * 8192 * 2048)
    assert forward_flops(job, 4096, 4096) == of_row


def test_phases(tmp_path: Path):
    config: dict[str, Any] = {
        "parallel": TP8_PP8,
        "rollout": {"tensor_parallel_size": 8, "max_concurrent_sequences": 4},
        "loss": {"kl_coef": 0.1, "old_logprobs": "recompute"},
        "memory": {"free_grad_buffers_during_rollout": True},
    }
    plan = memory_plan(plan_job(tmp_path, "Llama-3.1-70B", 1024, config))
    assert list(plan.phases) == ["weight_sync", "rollout", "logprobs", "reference", "update"]
    rollout = plan.phases["rollout"]
    assert rollout["engine weights"] == 2 * 70_553_706_496 // 8
    # 4 sequences of 4096 tokens: keys and values of one head of 128 in 80 layers, 2 bytes.
    assert rollout["KV cache"] == 4 * 4096 * 2 * 80 * 128 * 2
    assert rollout["gradients"] == 0 and plan.phases["update"]["gradients"] > 0
    assert rollout["reference"] == 2 * plan.held.num_parameters
    config["memory"]["reference"] = "swap"
    swapped = memory_plan(plan_job(tmp_path, "Llama-3.1-70B", 1024, config))
    assert "reference" not in swapped.phases["rollout"]
    assert swapped.host_bytes == 2 * plan.held.num_parameters // 16


def test_layouts_that_fit(tmp_path: Path):
    gpu, given = GPUS["h100-80"], Assumptions()
    job = plan_job(tmp_path, "Qwen2.5-7B", 8, {"train": {"micro_batch_size": 4}})
    plan = make_plan(job, gpu, 8, given)
    assert not plan.fits  # logits of 16384 tokens of 152064 words alone are 28 GiB
    found = layouts_that_fit(job, gpu, 8, given)
    assert found and all(it.fits and it.job.world_size == 8 for it in found)
    assert [it.time.seconds for it in found] == sorted(it.time.seconds for it in found)
    assert len({(it.job.config.parallel, it.job.config.rollout) for it in found}) == len(found)  # pyright: ignore


def test_errors_are_shares(tmp_path: Path):
    job = plan_job(tmp_path, "Qwen2.5-7B", 8)
    planned = held_by(job, 0).parameters
    (row,) = plan_against_measured(job, {"parameters": planned / 1.25})
    assert row == ("parameters", planned, planned / 1.25, 0.25)


def _plan(path: Path, *options: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(path), *options])
    return ended.value.code  # pyright: ignore[reportReturnType]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = save_job(tmp_path, "Llama-3.1-70B", {"parallel": TP8_PP8})
    chart = tmp_path / "memory.png"
    options = ["--world-size", "128", "--rollout.tensor_parallel_size", "8"]
    assert _plan(path, *options, "--chart", str(chart)) == 0
    told = capsys.readouterr().out
    assert "128 x h100-80, 8 a node: TP8 x PP8 x DP2; fits" in told
    assert "assumed, not measured" in told and chart.read_bytes()[:4] == b"\x89PNG"
    assert _plan(path, *options, "--rollout.tensor_parallel_size", "1") == 1
    assert "does not fit" in capsys.readouterr().out
    assert _plan(path, "--gpu", "h100") == 2
    assert "no 'h100'; did you mean 'h100-80'?" in capsys.readouterr().err
    assert _plan(path, "--world-size", "64", "--model-config", str(tmp_path / "absent")) == 2
    assert "its config.json is all that is read of it" in capsys.readouterr().err
    assert _plan(path, "--world-size", "64", "--dry-run", "--rank", "64") == 2
    assert "--rank is 64; --world-size 64 has 0 to 63" in capsys.readouterr().err
