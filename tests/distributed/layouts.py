"""The layouts that are compared, how, and the limits; tools/layout_matrix.py prints the table.

Adam divides each gradient by its own size. Where a gradient is hardly more than rounding, so is the
weight's step, and from the second step on the losses show it. The first step's limits are therefore
the narrow ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import plain_torch
import torch
from rank_harness import run_ranks
from tiny_llama import FAMILIES, MODELS, NUM_MINIBATCHES, TinyWeights, make_rollouts

from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.mapping import hf_shapes

Layout = Mapping[str, Any]
Results = dict[str, dict[str, Any]]

# Relative to max(1, |value|); in brackets the largest measured in any layout up to 8 ranks.
LIMITS = {
    "logprobs": 2e-6,  # (4.8e-7)
    "first_step": 5e-6,  # (1.4e-6) loss, gradient norm and statistics
    "gradients": 1e-5,  # (4.2e-6) of the worst tensor, to its largest entry, in the first step
    "losses": 2e-5,  # (4.6e-7) of all three steps
    "grad_norms": 3e-5,  # (1.3e-6)
    "statistics": 2e-4,  # (3.9e-6)
    "weights": 3e-4,  # (6.7e-6) of the change in three steps, Euclidean
    "weights_of_a_tensor": 1e-3,  # (4.9e-5) the same of the worst tensor
}

TWO_RANKS: dict[str, Layout] = {
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "pp2, 2 and 3": {"pp": 2, "stages": "Ett|tttL"},
    "pp2, 0 and 5": {"pp": 2, "stages": "E|tttttL"},
    "dp2": {},
    "dp2, overlapped": {"overlap": True},
    "tp2 sp": {"tp": 2, "sp": True},
    "cp2": {"cp": 2},
    "pp2 vp2": {"pp": 2, "vp": 2},
}
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
FOUR_RANKS: dict[str, Layout] = {
    "tp2 pp2": {"tp": 2, "pp": 2},
    "tp2 dp2": {"tp": 2},
    "pp2 dp2": {"pp": 2},
    "tp2 sp cp2": {"tp": 2, "sp": True, "cp": 2},
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
EIGHT_RANKS: dict[str, Layout] = {
    "tp2 sp pp2 cp2": {"tp": 2, "sp": True, "pp": 2, "cp": 2},
    "tp2 sp pp2 vp2 dp2": {"tp": 2, "sp": True, "pp": 2, "vp": 2},
    "tp4 pp2": {"tp": 4, "pp": 2},
    "tp2 pp4": {"tp": 2, "pp": 4},
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
    timeout: float = 300,
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


def start_weights(models: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The weights that all start from."""
    weights: dict[str, dict[str, torch.Tensor]] = {}
    for model in MODELS | FAMILIES:
        arch = load_architecture(models / model)
        source = TinyWeights(arch)
        weights[model] = {name: source.get(name) for name in hf_shapes(arch)}
    return weights


def relative(a: float, b: float) -> float:
    return abs(a - b) / max(1.0, abs(b))


def of_logprobs(a: Mapping[int, torch.Tensor], b: Mapping[int, torch.Tensor]) -> float:
    assert a.keys() == b.keys() == set(range(len(make_rollouts().completions)))
    pairs = [(a[s].double(), b[s].double()) for s in a if len(b[s])]
    return max(float(((x - y).abs() / y.abs().clamp(min=1)).max()) for x, y in pairs)


def of_gradients(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    """Largest difference of an entry, relative to the largest entry of its tensor."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max()) for name in b)


def of_weights(
    a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor]
) -> tuple[float, float]:
    """(over all tensors, of the worst tensor): distance relative to the change."""
    assert a.keys() == b.keys() == start.keys()
    apart = {name: float((a[name] - b[name]).double().norm()) for name in b}
    change = {name: float((b[name] - start[name]).double().norm()) for name in b}
    total = sum(x**2 for x in apart.values()) / sum(x**2 for x in change.values())
    return total**0.5, max(apart[name] / change[name] for name in b)


def differences(
    result: dict[str, Any], single: dict[str, Any], start: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Distance of a layout from the single process, by the names of LIMITS."""
    pairs = list(zip(result["steps"], single["steps"], strict=True))
    assert all(a.keys() == b.keys() for a, b in pairs)
    statistics = [{name: relative(a[name], b[name]) for name in b} for a, b in pairs]
    weights, worst = of_weights(result["weights"], single["weights"], start)
    return {
        "logprobs": of_logprobs(result["logprobs"], single["logprobs"]),
        "first_step": max(statistics[0].values()),
        "gradients": of_gradients(result["gradients"][0], single["gradients"][0]),
        "losses": max(step["total"] for step in statistics),
        "grad_norms": max(step["grad_norm"] for step in statistics),
        "statistics": max(max(step.values()) for step in statistics),
        "weights": weights,
        "weights_of_a_tensor": worst,
    }
