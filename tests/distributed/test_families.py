"""Every family in every layout is transformers' model, and gives back the weights it was given.

The table that this prints is the one in docs/conversion.md. Left out: training (test_layouts.py
has a Llama and a mixture of experts), bfloat16, real sizes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_harness import run_ranks

from gdpo_megatron.certify.family_models import MODELS, VOCAB_SIZE, save_model
from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.mapping import hf_shapes

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, dict[str, int]] = {
    "TP1": {},
    "TP2": {"tp": 2},
    "PP2": {"pp": 2},
    "TP2 in experts": {"tp": 2, "etp": 2},
    "EP2": {"ep": 2},
    "TP2 x PP2": {"tp": 2, "pp": 2},
}
WORLD_SIZES = {"TP1": 1, "TP2": 2, "TP2 in experts": 2, "PP2": 2, "EP2": 2, "TP2 x PP2": 4}
LIMIT = 2e-6
"""Largest difference of a logit, relative to max(1, |logit|)."""

Table = dict[str, dict[str, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, VOCAB_SIZE, (40,), generator=generator).tolist()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each model, of three layers: two stages are uneven.

    With weights of usual size: larger ones would also make rounding larger.
    """
    folder = tmp_path_factory.mktemp("families")
    for name, config in MODELS.items():
        save_model(folder / name, **config, initializer_range=0.04, num_hidden_layers=3)
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, models: Path, tokens: list[int]) -> Table:
    """Layout -> model -> what each rank found; one launch for each number of ranks."""
    table: Table = {}
    for world_size in sorted(set(WORLD_SIZES.values())):
        layouts = [name for name, size in WORLD_SIZES.items() if size == world_size]
        ranks = run_ranks(
            "rank_families:run",
            world_size,
            tmp_path_factory.mktemp("run") / "ranks",
            models=str(models),
            names=list(MODELS),
            layouts=[LAYOUTS[name] for name in layouts],
            tokens=tokens,
        )
        for index, layout in enumerate(layouts):
            names = ranks[0][index]
            table[layout] = {name: [rank[index][name] for rank in ranks] for name in names}
    return table


@pytest.fixture(scope="module")
def expected(models: Path, tokens: list[int]) -> dict[str, torch.Tensor]:
    """Logits of transformers in float32, with its plainest attention and experts."""
    from transformers import AutoModelForCausalLM

    logits: dict[str, torch.Tensor] = {}
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(
            models / name,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            local_files_only=True,
        )
        with torch.no_grad():
            logits[name] = model(torch.tensor([tokens[:-1]])).logits[0]
    return logits


def difference(ranks: list[dict[str, Any]], expected: torch.Tensor) -> float:
    found = [rank["logits"] for rank in ranks if rank["logits"] is not None]
    assert found, "no rank has logits"
    return max(float(((x - expected).abs() / expected.abs().clamp(min=1)).max()) for x in found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_transformers(
    layout: str, results: Table, expected: dict[str, torch.Tensor]
) -> None:
    measured = {name: difference(ranks, expected[name]) for name, ranks in results[layout].items()}
    print(layout, {name: f"{value:.1e}" for name, value in measured.items()})
    assert measured.keys() == {
        name
        for name, config in MODELS.items()
        if layout not in ("EP2", "TP2 in experts") or "num_local_experts" in config
    }
    assert {name: value for name, value in measured.items() if value > LIMIT} == {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_come_back(layout: str, results: Table, models: Path) -> None:
    """The stream of the weight sync and the export: all tensors, in order, bit for bit."""
    for name, ranks in results[layout].items():
        names = list(hf_shapes(load_architecture(models / name)))
        for rank in ranks:
            assert rank["names"] == names and rank["changed"] == []
