"""However rows are put into micro-batches, and packed or not: the same numbers, in every layout.

Everything is compared with the single process that pads two rows at a time, whose numbers
test_layouts.py proves against plain torch, and within the same limits.

Rotary attention sees only how far two tokens are apart. A pack whose positions go on from row to
row therefore has the same results, and the mistake is looked for in what attention gets.

Left out: context parallelism, under which packing is refused; Transformer Engine's attention.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from layouts import Results, case, run
from rank_harness import run_ranks
from test_layouts import assert_same

from gdpo_megatron.certify.layout_compare import LIMITS, Layout, differences, start_weights

pytestmark = pytest.mark.distributed

Batching = dict[str, Any]
PADDED: dict[str, Batching] = {
    "1 row": {"micro_batch_size": 1},
    "4 rows": {"micro_batch_size": 4},
    "40 tokens": {"max_tokens_per_micro_batch": 40},
    "70 tokens": {"max_tokens_per_micro_batch": 70},
    "5 tokens": {"max_tokens_per_micro_batch": 5},  # every row is longer but one
}
PACKED: dict[str, Batching] = {
    "2 rows packed": {"packing": True, "micro_batch_size": 2},
    "4 rows packed": {"packing": True, "micro_batch_size": 4},
    "40 tokens packed": {"packing": True, "max_tokens_per_micro_batch": 40},
    "70 tokens packed": {"packing": True, "max_tokens_per_micro_batch": 70},
}
TWO_RANKS: dict[str, Layout] = {
    "tp2": {"tp": 2},
    "tp2 sp": {"tp": 2, "sp": True},
    "pp2": {"pp": 2},
    "pp2 vp2": {"pp": 2, "vp": 2},
    "dp2": {},
}
SOME = {
    "1 row": PADDED["1 row"],
    "40 tokens": PADDED["40 tokens"],
    "2 rows packed": PACKED["2 rows packed"],
    "40 tokens packed": PACKED["40 tokens packed"],
}
# Ranks that share experts, where one has a row more than the other (see MicroBatching).
EXPERTS: dict[str, Layout] = {
    "ep2": {"ep": 2},
    "tp2 sp ep2": {"tp": 2, "sp": True, "ep": 2},
}
MUTANTS = {
    "attention_across_rows": ("4 rows packed", "logprobs"),
    "keys_positions_go_on": ("4 rows packed", "logprobs"),
    "last_row_of_a_pack_dropped": ("4 rows packed", "logprobs"),
    "row_lost_from_the_budget": ("40 tokens", "losses"),
}


def with_batching(model: str, layout: Layout, batching: Batching, **rest: Any) -> dict[str, Any]:
    return {**case(model, layout, **rest), "batching": batching}


@pytest.fixture(scope="module")
def one_rank(models: Path, engine_logprobs: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    every = {**PADDED, **PACKED}
    cases = {model: case(model, {}) for model in ("tied", "untied", "experts")}
    cases |= {name: with_batching("tied", {}, batching) for name, batching in every.items()}
    for model in ("untied", "experts"):
        name = f"{model} 4 rows packed"
        cases[name] = with_batching(model, {}, PACKED["4 rows packed"])
    cases |= {
        mutant: with_batching("tied", {}, every[batching], mutant=mutant)
        for mutant, (batching, _) in MUTANTS.items()
    }
    cases["positions"] = with_batching(
        "tied", {}, PACKED["4 rows packed"], mutant="all_positions_go_on"
    )
    return run(cases, 1, models, engine_logprobs, tmp_path_factory.mktemp("one") / "run")


@pytest.fixture(scope="module")
def start(models: Path) -> Any:
    return start_weights(models)


@pytest.fixture(scope="module")
def two_ranks(models: Path, engine_logprobs: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    cases = {
        f"{layout} {name}": with_batching("tied", TWO_RANKS[layout], batching)
        for layout in TWO_RANKS
        for name, batching in SOME.items()
    }
    cases |= {
        f"{layout} {name}": with_batching("experts", EXPERTS[layout], batching)
        for layout in EXPERTS
        for name, batching in SOME.items()
    }
    return run(cases, 2, models, engine_logprobs, tmp_path_factory.mktemp("two") / "run")


@pytest.mark.parametrize("batching", [*PADDED, *PACKED])
def test_one_rank(batching: str, one_rank: Results, start: Any) -> None:
    assert_same(one_rank[batching], one_rank["tied"], start["tied"])


@pytest.mark.parametrize("model", ["untied", "experts"])
def test_packing_of_other_models(model: str, one_rank: Results, start: Any) -> None:
    assert_same(one_rank[f"{model} 4 rows packed"], one_rank[model], start[model])


@pytest.mark.parametrize("batching", SOME)
@pytest.mark.parametrize("layout", [*TWO_RANKS, *EXPERTS])
def test_two_ranks(
    layout: str, batching: str, one_rank: Results, two_ranks: Results, start: Any
) -> None:
    model = "experts" if layout in EXPERTS else "tied"
    assert_same(two_ranks[f"{layout} {batching}"], one_rank[model], start[model])


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mistake_is_seen(mutant: str, one_rank: Results, start: Any) -> None:
    """Each exceeds the limit of what it breaks a hundred times over."""
    measured = differences(one_rank[mutant], one_rank["tied"], start["tied"])
    broken = MUTANTS[mutant][1]
    print({name: f"{value:.1e}" for name, value in measured.items()})
    assert measured[broken] > 100 * LIMITS[broken]


def test_positions_start_anew(one_rank: Results, start: Any, models: Path, tmp_path: Path) -> None:
    ((right, restarted_for_queries, never),) = run_ranks(
        "rank_positions:run",
        1,
        tmp_path / "run",
        models=str(models),
        mutants=[None, "keys_positions_go_on", "all_positions_go_on"],
    )
    assert right < 1e-5 < 1e-1 < min(restarted_for_queries, never)
    # As the docstring says: the results do not show it.
    assert_same(one_rank["positions"], one_rank["tied"], start["tied"])


def test_padding_by_hand(one_rank: Results) -> None:
    """Rows take 14, 11 and 7 positions; 22, 19, 9 and 1; 20. One minibatch each."""

    def shares(name: str) -> list[float]:
        return one_rank[name]["padding"]

    assert shares("tied") == pytest.approx([1 - 32 / (28 + 7), 1 - 51 / (44 + 18), 0])
    assert shares("4 rows") == pytest.approx([1 - 32 / 42, 1 - 51 / 88, 0])
    # 14 | 11 7 is more even than 14 11 | 7; so is 22 | 19 | 9 1.
    assert shares("40 tokens") == pytest.approx([1 - 32 / (14 + 22), 1 - 51 / (22 + 19 + 18), 0])
    assert all(shares(name) == [0, 0, 0] for name in ("1 row", "5 tokens", *PACKED))
