"""A Megatron policy synced into vLLM: its log-probs are what transformers makes of the weights.

The engine has made completions of the same prompts with other weights before, so that a stale
weight or cache shows. The table that this prints is the one in docs/rollout.md; with --full it has
all families, layouts and formats. Left out: mixtures of experts, FP8, GPUs.
"""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_harness import run_ranks
from support.sabotage import OF_ENGINE, SABOTAGES

from gdpo_megatron.certify.family_models import VOCAB_SIZE, save_model

pytestmark = [pytest.mark.distributed, pytest.mark.vllm]

FAMILIES = ("llama", "qwen2", "qwen3")
MODELS = {
    f"{family}, {'tied' if tied else 'untied'}": {
        "model_type": family,
        "tie_word_embeddings": tied,
        "hidden_size": 128,
        "head_dim": 32,  # what vLLM's attention takes on a CPU
        "max_position_embeddings": 256,
        "initializer_range": 0.05,  # usual ones: larger weights make rounding larger
    }
    for family, tied in itertools.product(FAMILIES, (True, False))
}
LAYOUTS: dict[int, dict[str, dict[str, int]]] = {
    2: {"TP2": {"tp": 2}, "PP2": {"pp": 2}},
    4: {"TP2 x PP2": {"tp": 2, "pp": 2}},
}
LIMITS = {"float32": (1e-5, 1e-5), "bfloat16": (0.02, 0.1)}
"""Mean and largest difference of a token's log-prob."""

TEMPERATURE = 0.8
SAMPLING = {
    "temperature": TEMPERATURE,
    "top_p": 1.0,
    "top_k": 0,
    "max_completion_tokens": 24,
    "stop": (),
    "stop_token_ids": (),
}


def case(model: str, dtype: str = "float32", tensor_parallel_size: int = 1) -> dict[str, Any]:
    return {"model": model, "dtype": dtype, "tensor_parallel_size": tensor_parallel_size}


SOME = {
    2: [
        *(case(name) for name in MODELS),
        case("qwen2, tied", tensor_parallel_size=2),
        case("qwen3, untied", "bfloat16"),
    ],
    4: [case("qwen2, tied"), case("qwen3, untied", tensor_parallel_size=2)],
}
ALL = [case(*it) for it in itertools.product(MODELS, LIMITS, (1, 2))]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        save_model(folder / name, **config)
    return folder


def draw_prompts() -> list[list[int]]:
    """Some longer than a block of vLLM's cache, two of them equal."""
    generator = torch.Generator().manual_seed(5)
    lengths = (3, 20, 150, 150, 200)
    rows = [torch.randint(2, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]
    return [*rows, rows[2]]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return draw_prompts()


@torch.no_grad()
def reference_logprobs(folder: Path, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Of a completion's tokens, by transformers in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = model(torch.tensor([prompt + completion])).logits[0].double() / TEMPERATURE
    logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0]


def check(
    models: Path, prompts: list[list[int]], world_size: int, cases: list[dict], folder: Path
) -> None:
    ranks = run_ranks(
        "rank_vllm:run",
        world_size,
        folder,
        models=str(models),
        cases=cases,
        layouts=LAYOUTS[world_size],
        prompts=prompts,
        sampling=SAMPLING,
        timeout=1500.0,
    )
    print("\n| model | dtype | engine TP | trainer | mean | largest |\n|---|---|---|---|---|---|")
    failures: list[str] = []
    for it, layout in itertools.product(cases, LAYOUTS[world_size]):
        by_rank = [rank[cases.index(it)][layout] for rank in ranks]
        assert all(completions == by_rank[0] for completions in by_rank), "ranks differ"
        differences = [
            abs(a - b)
            for prompt, (tokens, logprobs) in zip(prompts, by_rank[0], strict=True)
            for a, b in zip(
                logprobs,
                reference_logprobs(models / it["model"], prompt, tokens).tolist(),
                strict=True,
            )
        ]
        mean, largest = statistics.fmean(differences), max(differences)
        row = (it["model"], it["dtype"], it["tensor_parallel_size"], layout)
        print(f"| {' | '.join(map(str, row))} | {mean:.1e} | {largest:.1e} |")
        if mean > LIMITS[it["dtype"]][0] or largest > LIMITS[it["dtype"]][1]:
            failures.append(f"{row}: {mean:.1e}, {largest:.1e}")
    assert not failures


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_logprobs_are_those_of_the_new_weights(
    models: Path, prompts: list[list[int]], world_size: int, tmp_path: Path
):
    check(models, prompts, world_size, SOME[world_size], tmp_path / "ranks")


def test_sabotage_is_seen(models: Path, tmp_path: Path):
    """That of test_weight_sync.py, and what can go wrong in vLLM."""
    layouts: dict[str, dict[str, Any]] = {"tp2": {"tp": 2}, "pp2": {"pp": 2}}
    ranks = run_ranks(
        "rank_weight_sync:run",
        2,
        tmp_path / "ranks",
        folder=str(models / "qwen3, tied"),
        engine="vllm",
        layouts=layouts,
        dtypes=["float32"],
        others=[],
        failing={"tp2": [("load_weights", "hangs"), ("the canary", "hangs")]},
        max_length=192,
        timeout=600.0,
    )
    for name, sabotage in (SABOTAGES | OF_ENGINE["vllm"]).items():
        for layout in layouts:
            if sabotage.layouts is not None and layout not in sabotage.layouts:
                continue
            first, second = (rank[f"{layout} {name}"] for rank in ranks)
            print(layout, name, first["all"]["lines"])
            assert first == second
            assert first["all"]["checks"] == [sabotage.seen_by], name
            if sabotage.without_checksums is not None:
                assert first["no checksums"]["checks"] == [sabotage.without_checksums], name
    for call in ("load_weights", "the canary"):
        first, second = (rank[f"tp2 {call} hangs"] for rank in ranks)
        assert first == second and 0 <= first["difference"] < 1e-5
        assert f"(rank 1): the engine failed in {call}: EngineStalled: " in first["lines"][0]
    for layout in layouts:
        for report in ranks[0][f"{layout} float32"]:
            assert report["weight_sync/num_checksums"] > report["weight_sync/num_resident"] > 0
            assert 0 < report["weight_sync/canary_max_logprob_diff"] < 1e-5


@pytest.mark.full
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_logprobs_in_every_combination(
    models: Path, prompts: list[list[int]], world_size: int, tmp_path: Path
):
    check(models, prompts, world_size, ALL, tmp_path / "ranks")
