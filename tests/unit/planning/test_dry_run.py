"""The dry run: what a rank of a world holds and sends, against numbers worked out by hand.

Not covered: that a real rank holds and sends the same (test_plan_measured.py compares memory with
real runs; messages are Megatron's own calls), and Transformer Engine's layers.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from support.plan_jobs import plan_job, save_job

from gdpo_megatron.errors import InputError
from gdpo_megatron.planning.dry_run import RankRecord, dry_run, shard_sums
from gdpo_megatron.planning.job import load_job
from gdpo_megatron.policy.model import MegatronModel

SMALL = {"num_hidden_layers": 4, "hidden_size": 512, "intermediate_size": 1024, "vocab_size": 1000}
"""Of Llama-70B's shape: 64 heads of 8, 8 key/value heads."""

SHORT: dict[str, Any] = {
    "model": {"hf_path": ".", "max_sequence_length": 65},
    "rollout": {"max_completion_tokens": 32, "num_prompts_per_step": 8, "group_size": 2},
}


def _sent(record: RankRecord, phase: str, kind: str, group: str) -> dict[int, int]:
    """Bytes of a message -> how often."""
    (found,) = (it for it in record.phases if it.name == phase)
    return {it.num_bytes: it.count for it in found.traffic if (it.kind, it.group) == (kind, group)}


def test_70b_on_1024_gpus_in_one_process(tmp_path: Path):
    layout = {
        "tensor_model_parallel_size": 8,
        "pipeline_model_parallel_size": 8,
        "sequence_parallel": True,
    }
    path = save_job(tmp_path, "Llama-3.1-70B", {"parallel": layout})
    command = [sys.executable, "-m", "gdpo_megatron.cli", "plan", str(path), "--dry-run"]
    done = subprocess.run(
        [*command, "--world-size", "1024", "--rank", "515"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    # 10 layers of (10240 + 8192 + 2 * 28672 + 28672) * 8192 / 8 + 2 * 8192.
    assert "1,069,711,360 parameters: 2.0 GiB, gradients 4.0 GiB" in done.stdout
    assert "rank 515 of 1024 (TP8 x PP8 x DP16): tp 3, pp 4, dp 0" in done.stdout
    whole = "shards of the 64 places of the layout: 70,553,706,496 parameters = 70,553,706,496"
    assert whole in done.stdout
    kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert kib < 8 * 2**20  # the largest child of this process so far, whichever it was


def test_a_stage_in_the_middle(tmp_path: Path):
    layout = {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 4,
        "sequence_parallel": True,
    }
    job = plan_job(tmp_path, "Llama-3.1-70B", 16, {**SHORT, "parallel": layout}, **SMALL)
    # Ranks go tp, dp, pp: 4 of a stage, so rank 9 is tp 1, dp 0, pp 2.
    record = dry_run(job, 9, max_microbatches=8)
    assert (record.place.tp, record.place.dp, record.place.pp) == (1, 0, 2)
    # One layer: qkv (512 + 2 * 64) * 512, proj 512 * 512, fc1 2048 * 512, fc2 512 * 1024, halved;
    # two norms of 512.
    parameters = (640 * 512 + 512 * 512 + 2048 * 512 + 1024 * 512) // 2 + 1024
    assert record.num_parameters == parameters == 1_082_368
    assert record.parameter_bytes == 2 * parameters  # a multiple of 128 and 2: no padding
    assert record.gradient_bytes == 4 * parameters
    assert record.optimizer_bytes == 12 * parameters // 2
    # 16 rows on 2 data-parallel ranks, one at a time; 64 positions, 32 on each rank.
    assert (record.num_microbatches, record.config_microbatches) == (8, 8)
    assert record.shape == (1, 64)
    hidden = 32 * 512 * 2
    for kind, to in (("send", "next"), ("recv", "previous"), ("send", "previous")):
        # Of each micro-batch its hidden states and, before them, their 3 sizes.
        assert _sent(record, "update", kind, to) == {24: 8, hidden: 8}
    # Forward: before qkv and fc1, after proj and fc2. Backward: both again for the inputs'
    # gradients, and before the weights' gradients of qkv and fc1, whose input is gathered anew.
    assert _sent(record, "update", "all_gather", "tp") == {2 * hidden: 8 * (2 + 2 + 2)}
    assert _sent(record, "update", "reduce_scatter", "tp") == {2 * hidden: 8 * (2 + 2)}
    assert _sent(record, "update", "reduce_scatter", "dp") == {4 * parameters: 1}
    assert _sent(record, "update", "all_gather", "dp") == {2 * parameters: 1}


def test_experts_get_equal_shares(tmp_path: Path):
    layout = {"expert_model_parallel_size": 4}
    shape = {"num_hidden_layers": 2, "hidden_size": 256, "num_experts": 8, "vocab_size": 1000}
    changes = {**shape, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    job = plan_job(
        tmp_path, "Qwen3-30B-A3B-Instruct-2507", 8, {**SHORT, "parallel": layout}, **changes
    )
    record = dry_run(job, 6)
    assert (record.place.ep, record.place.dp) == (2, 6)
    # 64 tokens to 2 experts each, and back; their weights; both in the backward pass as well.
    sent = _sent(record, "update", "all_to_all", "ep")
    tokens, layers, micro_batches = 64 * 2, 2, record.num_microbatches
    assert sent[tokens * 256 * 2] == 2 * 2 * layers * micro_batches
    assert sent[tokens * 2] == 2 * layers * micro_batches


@pytest.mark.parametrize(
    "changes",
    [
        {
            "parallel": {
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
            }
        },
        {"parallel": {"context_parallel_size": 2}, "loss": {"kl_coef": 0.1}},
        {"train": {"packing": True, "micro_batch_size": 2}},
        {"model": {"hf_path": ".", "max_sequence_length": 65, "lora": {"rank": 4}}},
        {
            "precision": {"params_dtype": "bfloat16", "fp8": {"backend": "scaled_mm"}},
            "memory": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
        },
        {"loss": {"kl_coef": 0.1}, "memory": {"reference": "swap", "logprob_chunk_tokens": 16}},
    ],
    ids=["virtual", "context", "packing", "lora", "fp8", "swap"],
)
def test_every_kind_of_step_runs(tmp_path: Path, changes: dict[str, Any]):
    sizes = {**SMALL, "num_attention_heads": 8, "num_key_value_heads": 4}
    job = plan_job(tmp_path, "Llama-3.1-70B", 4, SHORT | changes, **sizes)
    record = dry_run(job, 1)
    names = [phase.name for phase in record.phases]
    assert names[0] == "weight_sync" and names[-1] == "update"
    assert ("reference" in names) == ("loss" in changes)
    assert all(phase.peak_bytes > 0 for phase in record.phases if phase.name != "weight_sync")


@pytest.mark.parametrize(
    ("name", "layout", "changes", "places"),
    [
        (
            "Llama-3.1-70B",
            {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2},
            {**SMALL, "tie_word_embeddings": True},
            8,
        ),
        (
            "Qwen3-30B-A3B-Instruct-2507",
            {
                "tensor_model_parallel_size": 2,
                "sequence_parallel": True,
                "pipeline_model_parallel_size": 2,
                "expert_model_parallel_size": 4,
                "expert_tensor_parallel_size": 2,
            },
            {"num_hidden_layers": 3, "hidden_size": 256, "num_experts": 8},
            16,
        ),
    ],
)
def test_shards_are_counted_once(
    tmp_path: Path, name: str, layout: dict[str, Any], changes: dict[str, Any], places: int
):
    sums = shard_sums(plan_job(tmp_path, name, 32, {"parallel": layout}, **changes))
    assert sums.is_whole and sums.num_places == places
    if name.startswith("Llama"):
        # 4 whole layers, embedding (rows padded from 1000 to 1024) on both stages, final norm.
        layers = 4 * (640 * 512 + 512 * 512 + 2048 * 512 + 1024 * 512 + 1024)
        assert sums.model_parameters == layers + 1000 * 512 + 512
        assert (sums.padding, sums.tied_copies) == (2 * 24 * 512, 1000 * 512)


def test_a_lost_shard_is_named(tmp_path: Path):
    job = plan_job(
        tmp_path, "Llama-3.1-70B", 4, {"parallel": {"tensor_model_parallel_size": 2}}, **SMALL
    )
    original = MegatronModel._find_rows

    def without_one(self: Any) -> None:
        original(self)
        if self.mesh.tp_rank == 1:
            self.stage_rows = [p for p in self.stage_rows if "layers.2.mlp.down" not in p[0].hf[0]]

    with mock.patch.object(MegatronModel, "_find_rows", without_one):
        sums = shard_sums(job)
    assert not sums.is_whole
    assert [line.split(":")[0] for line in sums.problems] == ["model.layers.2.mlp.down_proj.weight"]


def _problems(folder: Path, world_size: int, overrides: Sequence[str]) -> str:
    path = save_job(folder, "Llama-3.1-70B", {})
    with pytest.raises(InputError) as error:
        load_job(path, overrides, world_size=world_size)
    return "\n".join(error.value.problems)


def test_wrong_divisors_are_explained(tmp_path: Path):
    told = _problems(tmp_path, 1024, ["--parallel.tensor_model_parallel_size", "6"])
    assert "tensor_model_parallel_size 6 does not divide the model's 64 attention heads" in told
    assert "1024 ranks (--nproc x --nnodes) do not fit" in told
    told = _problems(tmp_path, 100, ["--rollout.tensor_parallel_size", "8"])
    assert "rollout.tensor_parallel_size 8 does not divide 100 ranks" in told
    told = _problems(tmp_path, 128, ["--parallel.pipeline_model_parallel_size", "128"])
    assert "pipeline_model_parallel_size is 128, but the model has only 80 layers" in told
