"""A plan as a picture: the memory of a GPU in each phase, stacked by what holds it."""

from __future__ import annotations

from pathlib import Path

from gdpo_megatron.planning.memory import PARTS
from gdpo_megatron.planning.plan import Plan

_GIB = 2**30


def draw(plan: Plan, title: str, path: Path) -> None:
    """Write a PNG (or what the suffix of `path` says)."""
    from matplotlib.figure import Figure

    phases = plan.memory.phases
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    bottom = dict.fromkeys(phases, 0.0)
    for part in PARTS:
        sizes = [parts.get(part, 0) / _GIB for parts in phases.values()]
        if any(sizes):
            axes.bar(list(phases), sizes, bottom=list(bottom.values()), label=part, width=0.6)
            bottom = {p: bottom[p] + n for p, n in zip(phases, sizes, strict=True)}
    axes.axhline(plan.limit_bytes / _GIB, color="black", linestyle="--", linewidth=1)
    axes.set_ylabel("GiB of a GPU")
    axes.set_title(title)
    figure.legend(loc="outside right center", fontsize="small", frameon=False)
    figure.savefig(path, dpi=120)
