"""More ranks of a vLLM engine than the model has key/value heads: each rank has a copy of one.

The native engine and Megatron take no such layout. Not covered: GPUs, and more than two copies.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rank_harness import run_ranks
from test_vllm_sync import LIMITS, MODELS, SAMPLING, draw_prompts, reference_logprobs

from gdpo_megatron.certify.family_models import save_model

pytestmark = [pytest.mark.distributed, pytest.mark.vllm, pytest.mark.full]


def test_a_head_is_repeated(tmp_path: Path):
    prompts = draw_prompts()
    config: dict[str, Any] = {**MODELS["qwen3, untied"], "num_key_value_heads": 1}
    save_model(tmp_path / "models" / "one", **config)
    ranks = run_ranks(
        "rank_vllm:run",
        2,
        tmp_path / "ranks",
        models=str(tmp_path / "models"),
        cases=[{"model": "one", "dtype": "float32", "tensor_parallel_size": 2}],
        layouts={"PP2": {"pp": 2}},
        prompts=prompts,
        sampling=SAMPLING,
        timeout=900.0,
    )
    first, second = (rank[0]["PP2"] for rank in ranks)
    assert first == second
    for prompt, (tokens, logprobs) in zip(prompts, first, strict=True):
        expected = reference_logprobs(tmp_path / "models" / "one", prompt, tokens).tolist()
        assert logprobs == pytest.approx(expected, abs=LIMITS["float32"][1])
