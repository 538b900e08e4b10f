"""Tensor, pipeline and data parallelism against one process: the same losses and gradients.

Import, log-probs, three updates and export of one small model, first in one process, then in each
layout. What is compared, and the limits: layout_compare.py; docs/parallelism.md has the numbers of
all layouts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gdpo_megatron.certify.check import Findings, Measured, Situation, findings_dict
from gdpo_megatron.certify.job import Job
from gdpo_megatron.platform import Platform

_MODEL = "tied"
_SINGLE = "single.pt"


def missing(situation: Situation) -> str | None:
    """More than one device."""
    return None if situation.num_devices > 1 else "needs 2 devices"


def run(job: Job) -> Findings:
    """One process, then ranks in each layout of their number."""
    job.ranks(f"{__name__}:alone", 1)
    measured: list[Measured] = []
    for num_ranks in (2, 4, 8):
        if num_ranks <= job.situation.num_devices:
            measured += job.findings(f"{__name__}:on_rank", num_ranks, num_ranks=num_ranks).measured
    return Findings(measured=measured)


def alone(platform: Platform, folder: Path) -> None:
    """Leave the numbers of one process in the folder."""
    import torch

    from gdpo_megatron.certify.layout_models import make_rollouts, write_models
    from gdpo_megatron.certify.layout_run import in_layout, run_updates, with_noise

    write_models(folder / "models", [_MODEL])
    with in_layout(platform) as layout:
        single = run_updates(folder / "models", _MODEL, layout)
    single["engine"] = with_noise(single["logprobs"], make_rollouts())
    torch.save(_on_host(single), folder / _SINGLE)


def on_rank(platform: Platform, folder: Path, *, num_ranks: int) -> dict[str, Any]:
    """Run every layout of so many ranks, and compare with what `alone` has left."""
    import torch
    import torch.distributed as dist

    from gdpo_megatron.certify.layout_compare import start_weights
    from gdpo_megatron.certify.layout_run import in_layout, run_updates

    single = torch.load(folder / _SINGLE, weights_only=True)
    start = start_weights(folder / "models", [_MODEL])[_MODEL]
    measured: list[Measured] = []
    for name, arguments in layouts_of(num_ranks).items():
        with in_layout(platform, **arguments) as layout:
            result = run_updates(folder / "models", _MODEL, layout, single["engine"])
            parts: list[Any] = [None] * num_ranks
            dist.all_gather_object(parts, result["logprobs"])
        for part in parts:
            result["logprobs"] |= part
        if dist.get_rank() == 0:  # which has weights and gradients
            measured += compare(name, _on_host(result), single, start)
    return findings_dict(measured)


def layouts_of(num_ranks: int) -> Mapping[str, Mapping[str, Any]]:
    """Name -> arguments of `in_layout`."""
    from gdpo_megatron.certify.layout_compare import EIGHT_RANKS, FOUR_RANKS, TWO_RANKS

    return {2: TWO_RANKS, 4: FOUR_RANKS, 8: EIGHT_RANKS}[num_ranks]


def compare(
    name: str, result: Mapping[str, Any], single: Mapping[str, Any], start: Mapping[str, Any]
) -> list[Measured]:
    """Hold a layout to the limits.

    Args:
        name: of the layout.
        result: of `run_updates`, log-probs of all ranks put together.
        single: the same of one process.
        start: weights that both began with.
    """
    from gdpo_megatron.certify.layout_compare import LIMITS, differences

    found = differences(result, single, start)
    changed = len(result["changed"])
    return [
        Measured(f"{name}: tensors changed by import and export", changed, "==", 0),
        *(Measured(f"{name}: {what}", value, "<=", LIMITS[what]) for what, value in found.items()),
    ]


def _on_host(value: Any) -> Any:
    """With all tensors in the host's memory."""
    from torch import Tensor

    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_host(it) for key, it in value.items()}
    return [_on_host(it) for it in value] if isinstance(value, list) else value
