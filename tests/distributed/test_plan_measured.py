"""The plan's memory against real runs of small models, by the tool that writes docs/planning.md.

Not covered: GPUs, Transformer Engine's layers, host memory, time.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from plan_against_measured import (  # pyright: ignore[reportMissingImports]  # isort: skip
    CASES,
    CHUNKS,
    LLAMA,
    MLP,
    MOE,
    SMALL,
    _layout,
    run,
)

pytestmark = pytest.mark.distributed

QUICK: list[Any] = [
    (LLAMA, "float32", _layout(tp=2, sp=True), MLP),
    (SMALL, "bfloat16", _layout(pp=2), CHUNKS),
    (MOE, "float32", _layout(ep=2), CHUNKS),
]


def _check(world_size: int, cases: list[Any]) -> None:
    for case, ranks in zip(cases, run(world_size, cases), strict=True):
        assert len(ranks) == world_size
        for rows in ranks:
            assert [row[0] for row in rows[:3]] == ["parameters", "gradients", "optimizer"]
            assert all(planned == measured > 0 for _, planned, measured, _ in rows[:3]), (
                case,
                rows,
            )
            assert rows[3][0] == "activations" and abs(rows[3][3]) < 0.10, (case, rows)


@pytest.mark.full
def test_two_ranks():
    _check(2, QUICK)


@pytest.mark.full
@pytest.mark.parametrize("world_size", sorted(CASES))
def test_all_cases(world_size: int):
    _check(world_size, CASES[world_size])
