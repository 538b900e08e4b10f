"""Weight sync over two ranks: buckets, what is proven of a sync, and what the proof sees.

A sabotage (tests/support/sabotage.py) is put into one sync in each layout; the check that must see
it is named there. Not covered: GPUs, engines over several ranks, the cost (tools).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rank_harness import run_ranks
from support.sabotage import SABOTAGES

from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.mapping import hf_shapes

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, dict[str, Any]] = {"dp2": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}}
DTYPES = ["float32", "bfloat16"]
MODEL = "gqa"
CASES = [
    (layout, name)
    for layout in LAYOUTS
    for name, it in SABOTAGES.items()
    if it.layouts is None or layout in it.layouts
]


@pytest.fixture(scope="module")
def ranks(
    model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    return run_ranks(
        "rank_weight_sync:run",
        2,
        tmp_path_factory.mktemp("sync") / "run",
        folder=str(model_folder(MODEL)),
        engine="native",
        layouts=LAYOUTS,
        dtypes=DTYPES,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_right_sync_is_proven(
    layout: str,
    dtype: str,
    ranks: list[dict[str, Any]],
    model_folder: Callable[[str], Path],
):
    shapes = hf_shapes(load_architecture(model_folder(MODEL)))
    numel = sum(rows * (columns[0] if columns else 1) for rows, *columns in shapes.values())
    limit = {"float32": 1e-5, "bfloat16": 0.1}[dtype]  # measured 1.2e-6 and 0.03
    for first, second in zip(*(rank[f"{layout} {dtype}"] for rank in ranks), strict=True):
        for name in first.keys() - {n for n in first if n.endswith("_seconds")}:
            assert first[name] == second[name], "ranks report differently"
    for report in ranks[0][f"{layout} {dtype}"]:
        assert report["weight_sync/num_bytes"] == numel * (4 if dtype == "float32" else 2)
        assert report["weight_sync/num_checksums"] == len(shapes)
        assert report["weight_sync/num_resident"] == len(shapes)
        # Two engines complete three prompts with six tokens each.
        assert report["weight_sync/canary_num_tokens"] == 2 * 3 * 6
        mean = report["weight_sync/canary_mean_logprob_diff"]
        assert 0 < mean <= report["weight_sync/canary_max_logprob_diff"] < limit


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_sabotage_is_seen(layout: str, name: str, ranks: list[dict[str, Any]]):
    sabotage = SABOTAGES[name]
    first, second = (rank[f"{layout} {name}"] for rank in ranks)
    assert first == second, "all ranks stop, with the same words"
    print(first["all"]["lines"])
    assert first["all"]["checks"] == [sabotage.seen_by]
    text = "\n".join(first["all"]["lines"])
    assert sabotage.names in text and text.startswith("weight sync of version 2, ")
    if sabotage.without_checksums is not None:
        assert first["no checksums"]["checks"] == [sabotage.without_checksums]
