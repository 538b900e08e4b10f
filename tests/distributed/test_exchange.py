"""What every rank knows after the exchange, for trainer and engine layouts that differ.

Every rank is told everything it should end up with and compares nothing itself: the expected
results are made here, from the completions alone.
"""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_harness import run_ranks

pytestmark = pytest.mark.distributed

NAN, INF = float("nan"), float("inf")
LARGE = 2**53 + 1  # no float64


def completions(lengths: list[int], seed: int) -> list[tuple[list[int], list[float]]]:
    draw = random.Random(seed)
    made = [
        ([draw.randrange(2**40) for _ in range(n)], [draw.gauss(-2, 1) for _ in range(n)])
        for n in lengths
    ]
    # What travels is float32: keep values that it holds exactly.
    return [(ids, torch.tensor(x, dtype=torch.float32).tolist()) for ids, x in made]


def make_steps() -> dict[str, dict[str, Any]]:
    uneven = completions([5, 0, 3, 1, 17, 2, 0, 8, 4], 1)
    bad = completions([3, 2, 4, 1], 2)
    bad[0][1][1] = NAN
    bad[2][1][:] = [INF, -INF, NAN, -0.0]
    return {
        # Samples in no order, two that nobody trains on (-1), completions without tokens.
        "uneven": {
            "completions": uneven,
            "replica_of": [0, 1, 1, 0, 1, 1, 1, 0, 1],
            "dp_rank_of": [1, 0, -1, 1, 0, 1, 1, -1, 1],
        },
        "one engine made all": {
            "completions": uneven,
            "replica_of": [1] * 9,
            "dp_rank_of": [0, 1] * 4 + [0],
        },
        "one rank trains on all": {
            "completions": uneven,
            "replica_of": [0, 1] * 4 + [0],
            "dp_rank_of": [1] * 9,
        },
        "nobody trains": {"completions": bad, "replica_of": [0, 1, 0, 1], "dp_rank_of": [-1] * 4},
        "no samples": {"completions": [], "replica_of": [], "dp_rank_of": []},
        "not finite": {"completions": bad, "replica_of": [1, 0, 0, 1], "dp_rank_of": [0, 1, 0, 1]},
    }


STEPS = make_steps()
GATHERED: list[dict[str, Any]] = [
    {
        "ids_of_ranks": ids_of_ranks,
        "values": {
            "float64": torch.tensor([NAN, INF, -INF, 0.1, -7.0, 1e300, 5e-324], dtype=torch.double),
            "float32 rows": torch.arange(21, dtype=torch.float32).reshape(7, 3) - 10,
            "int64": torch.tensor([LARGE, -LARGE, 0, 1, 2, 3, 2**62]),
            "bool": torch.tensor([True, False, True, True, False, True, True]),
        },
    }
    for ids_of_ranks in ([[4, 0, 6], [5, 1]], [[], [3, 2, 1, 0, 4, 5, 6]], [[], []])
]


def same(a: list[float], b: list[float]) -> bool:
    """Equal lists, NaN equal to itself and -0.0 other than 0.0."""
    return [(math.isnan(x) or x, math.copysign(1, x)) for x in a] == [
        (math.isnan(x) or x, math.copysign(1, x)) for x in b
    ]


def check_exchange(
    ranks: list[list[dict[str, Any]]], layouts: list[dict[str, int]], engine_sizes: list[int]
) -> None:
    setups = list(itertools.product(layouts, engine_sizes, STEPS))
    for index, (layout, engine_tp, name) in enumerate(setups):
        where = f"trainer {layout}, engines of {engine_tp}, {name}"
        step, of_ranks = STEPS[name], [rank[index] for rank in ranks]
        assert all(r["num_replicas"] == len(ranks) // engine_tp for r in of_ranks), where
        # Each completion is sent by one rank alone, and only what an engine made is sent.
        assert sum(r["num_sent"] for r in of_ranks) == len(step["completions"]), where
        for rank in of_ranks:
            due = [s for s, d in enumerate(rank["dp_rank_of"]) if d == rank["dp_rank"]]
            assert sorted(rank["received"]) == due, where
            for sample in due:
                tokens, logprobs, mask = rank["received"][sample]
                assert mask == [token % 3 > 0 for token in tokens], where
                assert tokens == step["completions"][sample][0], where
                assert same(logprobs, step["completions"][sample][1]), where


def check_gather(ranks: list[list[dict[str, torch.Tensor]]]) -> None:
    for rank in ranks:
        for result, case in zip(rank, GATHERED, strict=True):
            known = sorted(itertools.chain(*case["ids_of_ranks"]))
            for name, table in case["values"].items():
                expected = torch.zeros_like(table)
                expected[known] = table[known]
                assert result[name].dtype == table.dtype
                # Bit for bit, NaN included.
                assert torch.equal(result[name].nan_to_num(nan=12345.0), expected.nan_to_num(12345))
                assert torch.equal(result[name].isnan(), expected.isnan())


def run(
    world_size: int, layouts: list[dict[str, int]], engine_sizes: list[int], folder: Path
) -> None:
    gathers = GATHERED
    if world_size > 2:
        gathers = []
    ranks = run_ranks(
        "rank_exchange:everything",
        world_size,
        folder,
        gathers=gathers,
        exchanges={
            "layouts": layouts,
            "engine_sizes": engine_sizes,
            "steps": list(STEPS.values()),
        },
    )
    if gathers:
        check_gather([rank["gather"] for rank in ranks])
    check_exchange([rank["exchange"] for rank in ranks], layouts, engine_sizes)


def test_two_ranks(tmp_path: Path) -> None:
    run(2, [{"tp": 2}, {"pp": 2}, {}], [1, 2], tmp_path / "run")


@pytest.mark.full
def test_four_ranks(tmp_path: Path) -> None:
    layouts = [{"tp": 2, "pp": 2}, {"tp": 2}, {"pp": 2}, {"tp": 4}, {"pp": 4}, {}]
    run(4, layouts, [1, 2, 4], tmp_path / "run")
