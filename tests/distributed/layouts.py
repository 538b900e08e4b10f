"""Runs of small models in layouts; the tables of layouts that only tests run.

The other layouts, the measures and the limits are those of `gdpo-megatron certify`;
tools/layout_matrix.py prints the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import plain_torch
import torch
from rank_harness import run_ranks

from gdpo_megatron.certify.layout_compare import FOUR_RANKS, Layout
from gdpo_megatron.certify.layout_models import NUM_MINIBATCHES, make_rollouts

Results = dict[str, dict[str, Any]]

FAMILY_LAYOUTS: dict[str, dict[str, Layout]] = {
    "qwen2": {"tp2": {"tp": 2}},
    "llama": {"tp2 sp": {"tp": 2, "sp": True}},
    "experts": {
        "pp2": {"pp": 2},
        "dp2": {},
        "ep2": {"ep": 2},
        "tp2 sp ep2": {"tp": 2, "sp": True, "ep": 2},
        "cp2": {"cp": 2},
    },
}
FOUR_RANKS_FULL: dict[str, Layout] = {
    **FOUR_RANKS,
    "tp2 cp2": {"tp": 2, "cp": 2},
    "tp2 sp pp2": {"tp": 2, "sp": True, "pp": 2},
    "pp2 vp2 dp2, overlapped": {"pp": 2, "vp": 2, "overlap": True},
    "pp2 cp2": {"pp": 2, "cp": 2},
    "cp2 dp2": {"cp": 2},
    "tp4": {"tp": 4},
    "pp4": {"pp": 4},
    "cp4": {"cp": 4},
    "dp4": {},
}
EXPERTS_ON_FOUR_RANKS: dict[str, Layout] = {
    "tp2 sp ep2 dp2": {"tp": 2, "sp": True, "ep": 2},
    "ep2 pp2": {"ep": 2, "pp": 2},
    "ep4": {"ep": 4},
    "cp2 ep2 dp2": {"cp": 2, "ep": 2},
}


def case(
    model: str,
    layout: Layout,
    *,
    dtype: str = "float32",
    mutant: str | None = None,
    updates: int = NUM_MINIBATCHES,
) -> dict[str, Any]:
    return {
        "model": model,
        "layout": dict(layout),
        "dtype": dtype,
        "mutant": mutant,
        "updates": updates,
    }


def run(
    cases: Mapping[str, dict[str, Any]],
    world_size: int,
    models: Path,
    engine: Any,
    folder: Path,
    timeout: float = 900,
) -> Results:
    """Run all cases in one launch; what the ranks say is brought together by case."""
    ranks = run_ranks(
        "rank_layouts:run",
        world_size,
        folder,
        timeout=timeout,
        models=str(models),
        cases=list(cases.values()),
        engine=engine,
    )
    results: Results = {}
    for index, name in enumerate(cases):
        of_ranks = [rank[index] for rank in ranks]
        for other in of_ranks:
            assert other["steps"] == of_ranks[0]["steps"], f"{name}: ranks report differently"
            assert other["names"] == of_ranks[0]["names"]
            assert other["changed"] == of_ranks[0]["changed"]
        merged = {**of_ranks[0]}
        for key in ("logprobs", "logprobs_after"):
            merged[key] = {}
            for other in of_ranks:
                merged[key] |= {sample: torch.tensor(row) for sample, row in other[key].items()}
        results[name] = merged
    return results


def engine_logprobs(plain: Mapping[str, Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """What the engine is said to have had: the model's log-probs with noise, by sample."""
    noise = make_rollouts().rollout_noise
    return {
        name: [
            [x + e for x, e in zip(row.tolist(), errors, strict=True)]
            for row, errors in zip(results["logprobs"], noise, strict=True)
        ]
        for name, results in plain.items()
    }


def plain_logprobs(models: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """For each model, the log-probs of transformers."""
    rollouts = make_rollouts()
    return {
        name: {"logprobs": plain_torch.all_logprobs(plain_torch.load(models / name), rollouts)}
        for name in names
    }
