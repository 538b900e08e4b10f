"""A run that Megatron-Core 0.16 has saved goes on under 0.19; the other way it is refused.

This environment has 0.19, the interpreter that GDPO_OTHER_MEGATRON names has 0.16; scripts/test.sh
sets it. Two steps are compared after each load (why: test_checkpoints.py), of a
model in float32, one in bfloat16 with float32 main weights and one with experts. Left out:
Transformer Engine's optimizer, adapters, experts over ranks.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from rank_harness import run_ranks
from test_checkpoints import assert_same

OTHER = os.environ.get("GDPO_OTHER_MEGATRON")
LAYOUTS = {"dp2": {}, "tp2": {"tp": 2}}
RUNS = ("float32", "bfloat16", "experts")
# Experts are trained over TP ranks under sequence parallelism only.
CASES = [(run, layout) for run in RUNS for layout in LAYOUTS if (run, layout) != ("experts", "tp2")]
# Relative. In bfloat16 a layout has its own rounding.
LIMITS = {"float32": 2e-6, "bfloat16": 5e-3, "experts": 2e-6}

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        OTHER is None, reason="GDPO_OTHER_MEGATRON names no other one; scripts/test.sh does"
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("versions")


@pytest.fixture(scope="module")
def begun(models: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """What each of the two did on its own."""
    result: dict[str, dict[str, Any]] = {}
    for name, python in {"this": sys.executable, "other": OTHER}.items():
        (result[name],) = run_ranks(
            "rank_versions:begin",
            1,
            folder / f"begin_{name}",
            python=python,
            models=str(models),
            folder=str(folder / name),
        )
    return result


@pytest.fixture(scope="module")
def gone_on(models: Path, folder: Path, begun: Any) -> list[dict[str, Any]]:
    """What this one made, on two ranks, of what the other has saved."""
    return run_ranks(
        "rank_versions:go_on",
        2,
        folder / "go_on",
        models=str(models),
        folder=str(folder / "other"),
        layouts=LAYOUTS,
        cases=CASES,
    )


def test_they_are_two_versions(begun: dict[str, dict[str, Any]]) -> None:
    assert begun["this"]["version"].startswith("0.19.")
    assert begun["other"]["version"].startswith("0.16.")


@pytest.mark.parametrize("run", RUNS)
def test_both_train_alike(run: str, begun: dict[str, dict[str, Any]]) -> None:
    """Measured between 0.16.1 and 0.19.2: no difference at all, in any of the runs."""
    assert begun["this"][run] == begun["other"][run]


@pytest.mark.parametrize(("run", "layout"), CASES)
def test_what_the_older_saved_goes_on(
    layout: str, run: str, begun: dict[str, dict[str, Any]], gone_on: list[dict[str, Any]]
) -> None:
    for rank in gone_on:
        assert_same(rank[layout][run], begun["other"][run], LIMITS[run])


def test_what_the_newer_saved_is_refused(models: Path, folder: Path, begun: Any) -> None:
    (said,) = run_ranks(
        "rank_versions:refused",
        1,
        folder / "refused",
        python=OTHER,
        models=str(models),
        folder=str(folder / "this"),
    )
    place = folder / "this/float32/checkpoints/step_00000002"
    version = begun["other"]["version"]
    assert said.startswith(
        f"{place}: saved by megatron-core 0.19 or later, whose checkpoints {version}"
    )
