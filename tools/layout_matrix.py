"""Compares every layout with a single process, and prints what differs as a table.

    python tools/layout_matrix.py --ranks 2          # also 4 and 8; about a minute each on 2 cores

The models, the updates and the measures are those of tests/distributed: three GDPO updates in
float32 whose clips bind, with KL term and entropy bonus, from the same weights and the same
rollouts. A cell is the largest relative difference over the models, and must stay below the limit
in the head of its column.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gdpo_megatron.certify.layout_compare import (
    EIGHT_RANKS,
    LIMITS,
    TWO_RANKS,
    differences,
    start_weights,
)
from gdpo_megatron.certify.layout_models import FAMILIES, MODELS, write_models

TESTS = Path(__file__).resolve().parents[1] / "tests" / "distributed"


def _test_module() -> Any:
    """What runs layouts for the tests, which is no package."""
    if str(TESTS) not in sys.path:
        sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    return importlib.import_module("layouts")


def measure(num_ranks: int, folder: Path) -> dict[str, dict[str, float]]:
    """Layout -> measure -> largest difference over the models it was run with."""
    layouts = _test_module()
    models = folder / "models"
    write_models(models)
    names = list(MODELS | FAMILIES)
    engine: Any = layouts.engine_logprobs(layouts.plain_logprobs(models, names))
    start = start_weights(models)
    table = _cases(num_ranks)
    chosen = {model for model, _, _ in table}
    single = layouts.run(
        {model: layouts.case(model, {}) for model in names if model in chosen},
        1,
        models,
        engine,
        folder / "single",
        timeout=600,
    )
    cases = {f"{model} {name}": layouts.case(model, layout) for model, name, layout in table}
    results = layouts.run(cases, num_ranks, models, engine, folder / "ranks", timeout=1800)
    worst: dict[str, dict[str, float]] = {}
    for model, name, _ in table:
        label = f"{name} (experts)" if model == "experts" else name
        found = differences(results[f"{model} {name}"], single[model], start[model])
        row = worst.setdefault(label, dict.fromkeys(found, 0.0))
        for key, value in found.items():
            row[key] = max(row[key], value)
    return worst


def _cases(num_ranks: int) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(model, name, layout) of everything that is run on so many ranks."""
    layouts = _test_module()
    dense = {2: TWO_RANKS, 4: layouts.FOUR_RANKS_FULL, 8: EIGHT_RANKS}[num_ranks]
    cases = [(model, *item) for model in MODELS for item in dense.items()]
    of_families = {
        2: layouts.FAMILY_LAYOUTS,
        4: {"experts": layouts.EXPERTS_ON_FOUR_RANKS},
        8: dict[str, dict[str, Any]](),
    }[num_ranks]
    return cases + [(model, *item) for model, own in of_families.items() for item in own.items()]


def as_markdown(worst: Mapping[str, Mapping[str, float]], limits: Mapping[str, float]) -> str:
    """The table, one row per layout."""
    columns = list(limits)
    lines = [
        "| layout | "
        + " | ".join(f"{c.replace('_', ' ')} < {limits[c]:.0e}" for c in columns)
        + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, row in worst.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[c]:.1e}" for c in columns) + " |")
    return "\n".join(lines)


def main() -> None:
    """Entry point; ends with status 1 where a limit is exceeded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, choices=(2, 4, 8), default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        worst = measure(options.ranks, Path(folder))
    print(as_markdown(worst, LIMITS))
    exceeded = [n for n, row in worst.items() if any(row[c] > LIMITS[c] for c in LIMITS)]
    if exceeded:
        sys.exit(f"over the limit: {', '.join(exceeded)}")


if __name__ == "__main__":
    main()
