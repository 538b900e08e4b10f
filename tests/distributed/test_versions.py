"""A run that one version of Megatron-Core has saved goes on under another one, both ways.

This environment has one version, the interpreter that GDPO_OTHER_MEGATRON names has the other;
scripts/test.sh sets it. Two steps are compared after each load (why: test_checkpoints.py), of a
model in float32, one in bfloat16 with float32 main weights and one with experts, whose optimizer
is two. Left out: Transformer Engine's optimizer, adapters.
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
LAYOUTS = {"dp2": {}, "tp2_sp": {"tp": 2, "sp": True}}
RUNS = ("float32", "bfloat16", "experts")
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
def gone_on(models: Path, folder: Path, begun: Any) -> dict[str, list[dict[str, Any]]]:
    """What each of the two, on two ranks, made of what the other has saved."""
    return {
        name: run_ranks(
            "rank_versions:go_on",
            2,
            folder / f"go_on_{name}",
            python=python,
            models=str(models),
            folder=str(folder / source),
            layouts=LAYOUTS,
        )
        for name, python, source in (("this", sys.executable, "other"), ("other", OTHER, "this"))
    }


def test_they_are_two_versions(begun: dict[str, dict[str, Any]]) -> None:
    assert begun["this"]["version"] != begun["other"]["version"]


@pytest.mark.parametrize("run", RUNS)
def test_both_train_alike(run: str, begun: dict[str, dict[str, Any]]) -> None:
    """Measured between 0.16.1 and 0.19.2: no difference at all, in any of the runs."""
    assert begun["this"][run] == begun["other"][run]


@pytest.mark.parametrize("reader", ["this", "other"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("run", RUNS)
def test_what_the_other_saved_goes_on(
    reader: str,
    layout: str,
    run: str,
    begun: dict[str, dict[str, Any]],
    gone_on: dict[str, list[dict[str, Any]]],
) -> None:
    writer = {"this": "other", "other": "this"}[reader]
    for rank in gone_on[reader]:
        assert_same(rank[layout][run], begun[writer][run], LIMITS[run])
