"""Runs that one version of Megatron-Core saves and another one goes on with, on this rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rank_checkpoints import BFLOAT16, Run
from rank_layouts import in_layout

RUNS: dict[str, dict[str, str]] = {
    "float32": {},
    "bfloat16": BFLOAT16,
    "experts": {"model": "experts"},
}


def begin(models: str, folder: str) -> dict[str, Any]:
    """Train each run 2 steps, save it in <folder>/<name>, train 2 more."""
    from megatron.core import package_info

    result: dict[str, Any] = {"version": package_info.__shortversion__}
    with in_layout() as layout:
        for name, options in RUNS.items():
            run = Run(models, Path(folder, name), layout, **options)
            run.train(2)
            run.save()
            result[name] = run.train(2)
    return result


def go_on(
    models: str, folder: str, layouts: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """In each layout, load each run of `begin` over other weights and train it 2 steps."""
    result: dict[str, dict[str, Any]] = {}
    for layout, sizes in layouts.items():
        result[layout] = {}
        with in_layout(**sizes) as where:
            for name, options in RUNS.items():
                run = Run(models, Path(folder, name), where, distance=0.5, **options)
                run.train(1)  # its optimizer has a past too
                run.load()
                result[layout][name] = run.train(2)
    return result
