"""Converted checkpoints are what Megatron itself reads and writes, in every layout.

The converter makes distributed checkpoints without a model. Here Megatron's own loader reads them
into real models, and its own saver writes models that the converter then reads. Left out:
Transformer Engine's spec, bfloat16 (nobody computes with these bytes).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_harness import run_ranks

from gdpo_megatron.certify.family_models import MODELS, save_model
from gdpo_megatron.conversion.convert import convert
from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.hf_io import HFCheckpoint
from gdpo_megatron.conversion.mapping import hf_shapes

pytestmark = pytest.mark.distributed

# Every kind of row: biases, q/k norms, experts, tied and untied.
NAMES = ("gqa", "qwen2_tied", "qwen3_moe")
LAYOUTS: dict[str, dict[str, int]] = {
    "TP1": {},
    "TP2": {"tp": 2},
    "PP2": {"pp": 2},
    "PP2 x VP2": {"pp": 2, "vp": 2},
    "EP2": {"ep": 2},
    "TP2 x PP2": {"tp": 2, "pp": 2},
}
WORLD_SIZES = {"TP1": 1, "TP2": 2, "PP2": 2, "PP2 x VP2": 2, "EP2": 2, "TP2 x PP2": 4}
SINGLE = "PP2"
"""The layout that saves a key for each layer and expert, as megatron-core can be told to."""


def models_of(layout: str) -> list[str]:
    return [n for n in NAMES if layout != "EP2" or n == "qwen3_moe"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<folders>/hf/<name>, and of each <folders>/megatron/<name> in several files."""
    folder = tmp_path_factory.mktemp("conversion")
    for name in NAMES:
        save_model(folder / "hf" / name, **MODELS[name], num_hidden_layers=4)
        convert(folder / "hf" / name, folder / "megatron" / name, to="megatron", shard_bytes=70_000)
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, folders: Path) -> dict[str, list[Any]]:
    """Layout -> for each rank, model -> parameters that differ; one launch for each rank count."""
    table: dict[str, list[Any]] = {}
    for world_size in sorted(set(WORLD_SIZES.values())):
        layouts = {n: LAYOUTS[n] for n, size in WORLD_SIZES.items() if size == world_size}
        ranks = run_ranks(
            "rank_conversion:run",
            world_size,
            tmp_path_factory.mktemp("run") / "ranks",
            models=str(folders / "hf"),
            converted=str(folders / "megatron"),
            saved=str(folders / "saved"),
            names=list(NAMES),
            layouts=layouts,
            single=SINGLE,
        )
        for layout in layouts:
            table[layout] = [rank[layout] for rank in ranks]
    return table


@pytest.mark.parametrize("layout", LAYOUTS)
def test_megatron_loads_what_was_converted(layout: str, results: dict[str, list[Any]]) -> None:
    """Bit for bit what `MegatronModel.load_hf` makes of the Hugging Face folder."""
    for rank in results[layout]:
        assert rank == {name: [] for name in models_of(layout)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_megatron_saves_is_converted(
    layout: str, results: dict[str, list[Any]], folders: Path, tmp_path: Path
) -> None:
    """Bit for bit the tensors that the models were loaded from, and no others."""
    assert results
    for name in models_of(layout):
        source = folders / "hf" / name
        convert(folders / "saved" / layout / name, tmp_path / name, to="hf", hf_files=source)
        arch = load_architecture(source)
        there, back = HFCheckpoint(source, arch), HFCheckpoint(tmp_path / name, arch)
        changed = [n for n in hf_shapes(arch) if not torch.equal(there.get(n), back.get(n))]
        assert changed == [], name
