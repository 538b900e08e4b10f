"""Weight sync over two ranks: buckets, what is proven of a sync, and what the proof sees.

A sabotage (tests/support/sabotage.py) is put into one sync in each layout; the check that must see
it is named there. A call that fails or hangs in one engine stops all ranks, which then sync again.
Memory: tests/unit/weight_sync; a call that no exception can leave: tests/unit/rollout. Not covered:
GPUs, engines over several ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rank_harness import run_ranks
from support.failing_engine import CALLS, SHORT
from support.sabotage import SABOTAGES

from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.mapping import hf_shapes

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, dict[str, Any]] = {"dp2": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}}
DTYPES = ["float32", "bfloat16"]
MODEL = "gqa"
CASES = [
    (layout, name)
    for layout in LAYOUTS
    for name, it in SABOTAGES.items()
    if it.layouts is None or layout in it.layouts
]


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "experts ep2": ("qwen3_moe", {"ep": 2}),
    "experts tp2 ep2": ("qwen3_moe", {"tp": 2, "sp": True, "ep": 2}),
    "experts tp2 etp2": ("qwen3_moe", {"tp": 2, "sp": True, "etp": 2}),
    "tied, biases, pp2": ("qwen2_tied", {"pp": 2}),
    "tied, norms of heads, tp2": ("qwen3_tied", {"tp": 2}),
}
FAILING = {
    "tp2": [(call, "hangs") for call in CALLS],
    "pp2": [("load_weights", "hangs"), *((call, "raises") for call in CALLS)],
}
BUCKETS = [1, 100_000, 2**30]
# [all-gathers, broadcasts] for each of them, counted by hand. `gqa` has 15 rows; 100,000 bytes are
# embedding, norm | qkv to fc1 | fc2 and the next layer's norm to norm | fc1, fc2, final norm |
# output layer; the third has rows of both stages. `qwen3_moe` has 17 rows, and 2 for each of
# 4 experts in 2 layers, whose halves are on two ranks, in 7 buckets, one of experts only.
COLLECTIVES: dict[str, tuple[str, dict[str, Any], list[list[int]]]] = {
    "dp2": ("gqa", {}, [[0, 0], [0, 0], [0, 0]]),
    "tp2": ("gqa", {"tp": 2}, [[15, 0], [5, 0], [1, 0]]),
    "pp2": ("gqa", {"pp": 2}, [[0, 15], [0, 6], [0, 2]]),
    "ep2": ("qwen3_moe", {"ep": 2}, [[0, 16], [0, 6], [0, 4]]),
    "tp2 ep2": ("qwen3_moe", {"tp": 2, "sp": True, "ep": 2}, [[17, 16], [6, 6], [1, 4]]),
}


@pytest.fixture(scope="module")
def ranks(
    model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    return run_ranks(
        "rank_weight_sync:run",
        2,
        tmp_path_factory.mktemp("sync") / "run",
        folder=str(model_folder(MODEL)),
        engine="native",
        layouts=LAYOUTS,
        dtypes=DTYPES,
        others=[(name, str(model_folder(it)), layout) for name, (it, layout) in OTHERS.items()],
        failing=FAILING,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_right_sync_is_proven(
    layout: str,
    dtype: str,
    ranks: list[dict[str, Any]],
    model_folder: Callable[[str], Path],
):
    shapes = hf_shapes(load_architecture(model_folder(MODEL)))
    numel = sum(rows * (columns[0] if columns else 1) for rows, *columns in shapes.values())
    limit = {"float32": 1e-5, "bfloat16": 0.1}[dtype]  # measured 1.2e-6 and 0.03
    for first, second in zip(*(rank[f"{layout} {dtype}"] for rank in ranks), strict=True):
        for name in first.keys() - {n for n in first if n.endswith("_seconds")}:
            assert first[name] == second[name], "ranks report differently"
    for report in ranks[0][f"{layout} {dtype}"]:
        assert report["weight_sync/num_bytes"] == numel * (4 if dtype == "float32" else 2)
        assert report["weight_sync/num_checksums"] == len(shapes)
        assert report["weight_sync/num_resident"] == len(shapes)
        # Two engines complete three prompts with six tokens each.
        assert report["weight_sync/canary_num_tokens"] == 2 * 3 * 6
        mean = report["weight_sync/canary_mean_logprob_diff"]
        assert 0 < mean <= report["weight_sync/canary_max_logprob_diff"] < limit


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_sabotage_is_seen(layout: str, name: str, ranks: list[dict[str, Any]]):
    sabotage = SABOTAGES[name]
    first, second = (rank[f"{layout} {name}"] for rank in ranks)
    assert first == second, "all ranks stop, with the same words"
    print(first["all"]["lines"])
    assert first["all"]["checks"] == [sabotage.seen_by]
    text = "\n".join(first["all"]["lines"])
    assert sabotage.names in text and text.startswith("weight sync of version 2, ")
    if sabotage.without_checksums is not None:
        assert first["no checksums"]["checks"] == [sabotage.without_checksums]


@pytest.mark.parametrize(
    ("layout", "call", "kind"),
    [(layout, *case) for layout, cases in FAILING.items() for case in cases],
)
def test_a_call_of_one_engine_fails(layout: str, call: str, kind: str, ranks: list[dict[str, Any]]):
    first, second = (rank[f"{layout} {call} {kind}"] for rank in ranks)
    assert first == second, "all ranks stop, with the same words"
    assert first["lines"] == [
        ("after the rollouts" if call == "sleep" else "weight sync of version 1")
        + f", engine (rank 1): the engine failed in {call}: "
        + {
            "raises": "KeyError: 'gone'; its traceback is above",
            "hangs": f"EngineStalled: no progress of {call} for {SHORT:g} s "
            "(rollout.stall_timeout_seconds); see its stacks above; raise "
            "rollout.stall_timeout_seconds if it was only slow",
        }[kind]
    ]
    assert 0 <= first["difference"] < 1e-5


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_proven(
    name: str, ranks: list[dict[str, Any]], model_folder: Callable[[str], Path]
):
    shapes = hf_shapes(load_architecture(model_folder(OTHERS[name][0])))
    for report in ranks[0][name]:
        assert report["weight_sync/num_resident"] == len(shapes)
        assert 0 < report["weight_sync/canary_max_logprob_diff"] < 1e-5


def test_buckets(model_folder: Callable[[str], Path], tmp_path: Path):
    """The same tensors from buckets of any size; collectives are by bucket."""
    results = run_ranks(
        "rank_weight_sync:buckets",
        2,
        tmp_path / "run",
        python=sys.executable,  # not forked: see support/peak_memory.py
        cases={
            name: (str(model_folder(it)), layout) for name, (it, layout, _) in COLLECTIVES.items()
        },
        sizes=BUCKETS,
    )
    for name, (model, _, collectives) in COLLECTIVES.items():
        names = list(hf_shapes(load_architecture(model_folder(model))))
        for size, calls in zip(BUCKETS, collectives, strict=True):
            for of_rank in results:
                it = of_rank[f"{name} {size}"]
                assert it["names"] == names and it["wrong"] == []
                assert it["calls"] == calls
