"""Runs that one version of Megatron-Core saves and another one goes on with, on this rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rank_checkpoints import BFLOAT16, Run
from rank_layouts import in_layout

from gdpo_megatron.errors import InputError

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


def refused(models: str, folder: str) -> str:
    """What is said when the runs of `begin` cannot be loaded."""
    with in_layout() as layout:
        run = Run(models, Path(folder, "float32"), layout)
        try:
            run.load()
        except InputError as error:
            return str(error)
    return "nothing"


def go_on(
    models: str,
    folder: str,
    layouts: dict[str, dict[str, int]],
    cases: list[tuple[str, str]],
) -> dict[str, dict[str, Any]]:
    """Load runs of `begin` over other weights and train them 2 steps.

    Args:
        models: folder of the models.
        folder: what `begin` was given.
        layouts: name -> arguments of `in_layout`.
        cases: (run, layout) of each.

    Returns:
        Layout -> run -> steps.
    """
    result: dict[str, dict[str, Any]] = {}
    for layout, sizes in layouts.items():
        result[layout] = {}
        with in_layout(**sizes) as where:
            for name, options in RUNS.items():
                if (name, layout) not in cases:
                    continue
                run = Run(models, Path(folder, name), where, distance=0.5, **options)
                run.train(1)  # its optimizer has a past too
                run.load()
                result[layout][name] = run.train(2)
    return result
