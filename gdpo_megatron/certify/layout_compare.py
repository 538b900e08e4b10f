"""The layouts that are compared with one process, how, and the limits.

Adam divides each gradient by its own size. Where a gradient is hardly more than rounding, so is the
weight's step, and from the second step on the losses show it. The first step's limits are therefore
the narrow ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdpo_megatron.certify.layout_models import FAMILIES, MODELS, TinyWeights
from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.mapping import hf_shapes

Layout = Mapping[str, Any]
"""Arguments of `in_layout`."""

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
"""Relative to max(1, |value|); in brackets the largest measured in any layout up to 8 ranks, on a
CPU in float32."""

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
FOUR_RANKS: dict[str, Layout] = {
    "tp2 pp2": {"tp": 2, "pp": 2},
    "tp2 dp2": {"tp": 2},
    "pp2 dp2": {"pp": 2},
    "tp2 sp cp2": {"tp": 2, "sp": True, "cp": 2},
}
EIGHT_RANKS: dict[str, Layout] = {
    "tp2 sp pp2 cp2": {"tp": 2, "sp": True, "pp": 2, "cp": 2},
    "tp2 sp pp2 vp2 dp2": {"tp": 2, "sp": True, "pp": 2, "vp": 2},
    "tp4 pp2": {"tp": 4, "pp": 2},
    "tp2 pp4": {"tp": 2, "pp": 4},
}


def start_weights(
    models: Path, names: Iterable[str] = (*MODELS, *FAMILIES)
) -> dict[str, dict[str, Tensor]]:
    """Model -> the weights that all layouts start from.

    Args:
        models: folder of `write_models`.
        names: of those that are wanted.
    """
    weights: dict[str, dict[str, Tensor]] = {}
    for model in names:
        arch = load_architecture(models / model)
        source = TinyWeights(arch)
        weights[model] = {name: source.get(name) for name in hf_shapes(arch)}
    return weights


def relative(a: float, b: float) -> float:
    """Distance relative to max(1, |b|)."""
    return abs(a - b) / max(1.0, abs(b))


def of_logprobs(a: Mapping[int, Sequence[float]], b: Mapping[int, Sequence[float]]) -> float:
    """Largest relative distance over all samples, of which both have the same."""
    assert a.keys() == b.keys()
    pairs = [(_double(a[s]), _double(b[s])) for s in a if len(b[s])]
    return max(float(((x - y).abs() / y.abs().clamp(min=1)).max()) for x, y in pairs)


def _double(row: Sequence[float]) -> Tensor:
    return torch.as_tensor(row, dtype=torch.float64)


def of_gradients(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Largest difference of an entry, relative to the largest entry of its tensor."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max()) for name in b)


def of_weights(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], start: Mapping[str, Tensor]
) -> tuple[float, float]:
    """(over all tensors, of the worst tensor): distance relative to the change."""
    assert a.keys() == b.keys() == start.keys()
    apart = {name: float((a[name] - b[name]).double().norm()) for name in b}
    change = {name: float((b[name] - start[name]).double().norm()) for name in b}
    total = sum(x**2 for x in apart.values()) / sum(x**2 for x in change.values())
    return total**0.5, max(apart[name] / change[name] for name in b)


def differences(
    result: Mapping[str, Any], single: Mapping[str, Any], start: Mapping[str, Tensor]
) -> dict[str, float]:
    """Distance of a layout from the single process, by the names of LIMITS.

    Args:
        result: of `run_updates`, log-probs of all ranks put together.
        single: the same of one process.
        start: the weights that both began with.
    """
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
