"""What an update does where something is wrong or tiny; the same in every layout.

Left out: losses that are not finite on single tokens (the loss masks them; its own tests).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rank_harness import run_ranks

pytestmark = pytest.mark.distributed

LAYOUTS = [{"tp": 2}, {"pp": 2}, {}]


@pytest.fixture(scope="module")
def ranks(models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """For each rank, what rank_updates.py found."""
    folder = tmp_path_factory.mktemp("updates") / "run"
    return run_ranks("rank_updates:edges", 2, folder, models=str(models), layouts=LAYOUTS)


@pytest.fixture
def outcomes(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each rank and layout."""
    return [outcome for rank in ranks for outcome in rank["layouts"]]


def test_gradient_that_is_not_finite(outcomes: list[dict[str, Any]]) -> None:
    """NaN or infinity on one data-parallel rank: all ranks raise, no weight moves, and the next
    update is the one that a policy takes which has never seen it."""
    for outcome in outcomes:
        assert len(outcome["messages"]) == 2
        assert all(message.startswith("gradient norm is nan") for message in outcome["messages"])
        assert outcome["untouched"] and outcome["goes_on"]


def test_clipping(outcomes: list[dict[str, Any]]) -> None:
    """max_grad_norm 0 leaves the gradient and still reports its norm.

    With epsilon 1 Adam's step is nearly proportional to the gradient, so a bound of 0.25 at a norm
    of 7.75 shortens it to about 0.25 / 7.75 = 0.032, and less so where gradients near 1 saturate.
    """
    for outcome in outcomes:
        assert outcome["norms"][0.25] == outcome["norms"][0.0] == outcome["norms"][1e9]
        assert outcome["norms"][0.0] == pytest.approx(7.7511, rel=1e-4)
        assert outcome["zero_is_unbounded"]
        assert 0.034 < outcome["clipped_share"] < 0.07


def test_bfloat16_keeps_small_steps(ranks: list[dict[str, Any]]) -> None:
    """Steps of 1e-5 are below half a unit of most bfloat16 weights; the main weights add them up.

    One update changes 6 % of the weights, 40 change 88 %; without main weights it would stay 6 %.
    """
    for rank in ranks:
        first, after = rank["small_steps"]["changed_shares"]
        assert first < 0.1 and after > 0.8
        assert rank["small_steps"]["main_dtypes"] == ["torch.float32"]
