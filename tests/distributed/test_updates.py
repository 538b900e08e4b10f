"""What an update does where something is wrong or tiny; the same in every layout.

Left out: losses that are not finite on single tokens (the loss masks them; its own tests).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rank_harness import run_ranks

pytestmark = pytest.mark.distributed

LAYOUTS = {"dp2": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}}


@pytest.fixture(scope="module")
def ranks(models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """For each layout and rank, what rank_updates.py found."""
    folder = tmp_path_factory.mktemp("updates") / "run"
    layouts = list(LAYOUTS.values())
    results = run_ranks("rank_updates:edges", 2, folder, models=str(models), layouts=layouts)
    return [rank[i] for i in range(len(layouts)) for rank in results]


def test_gradient_that_is_not_finite(ranks: list[dict[str, Any]]) -> None:
    """NaN or infinity on one data-parallel rank: all ranks raise, no weight moves, and the next
    update is the one that a policy takes which has never seen it."""
    for rank in ranks:
        assert len(rank["messages"]) == 2
        assert all(message.startswith("gradient norm is nan") for message in rank["messages"])
        assert rank["untouched"] and rank["goes_on"]


def test_clipping(ranks: list[dict[str, Any]]) -> None:
    """max_grad_norm 0 leaves the gradient and still reports its norm.

    With epsilon 1 Adam's step is nearly proportional to the gradient, so a bound of 0.25 at a norm
    of 7.43 shortens it to about 0.25 / 7.43 = 0.034, and less so where gradients near 1 saturate.
    """
    for rank in ranks:
        assert rank["norms"][0.25] == rank["norms"][0.0] == rank["norms"][1e9]
        assert rank["norms"][0.0] == pytest.approx(7.4301, rel=1e-4)
        assert rank["zero_is_unbounded"]
        assert 0.034 < rank["clipped_share"] < 0.07


def test_bfloat16_keeps_small_steps(ranks: list[dict[str, Any]]) -> None:
    """Steps of 1e-5 are below half a unit of most bfloat16 weights; the main weights add them up.

    One update changes 6 % of the weights, 40 change 88 %; without main weights it would stay 6 %.
    """
    for rank in ranks:
        first, after = rank["changed_shares"]
        assert first < 0.1 and after > 0.8
        assert rank["main_dtypes"] == ["torch.float32"]
