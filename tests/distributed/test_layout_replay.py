"""The stories example gives the same tokens and losses in other layouts as in one process.

Short runs on small batches here; --full takes the example as it is, 20 steps. Mistakes must be
seen: a weight that is off, noise that belongs to a rank. Not covered: more than two ranks, a GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from replay import LAYOUTS, MAX_LOSS_DIFFERENCE, MAX_MARGIN, Comparison, compare
from support.assets import needed

pytestmark = pytest.mark.distributed

SMALL = {
    "train.num_steps": 3,
    "rollout.num_prompts_per_step": 4,
    "rollout.group_size": 4,
    "rollout.max_completion_tokens": 60,
    "train.micro_batch_size": 8,
}
MISTAKES = {
    "nudged": ("dp2", "nudged_weights"),
    "own noise": ("dp2", "noise_of_rank"),
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Comparison]:
    """Layouts, and mistakes in a layout."""
    needed("models/stories260K")
    _, comparisons = compare(
        [word for key, value in SMALL.items() for word in (f"--{key}", str(value))],
        {name: LAYOUTS[name] for name in ("tp2", "dp2")}
        | {name: LAYOUTS[layout] for name, (layout, _) in MISTAKES.items()},
        tmp_path_factory.mktemp("replay") / "runs",
        mutants={name: mutant for name, (_, mutant) in MISTAKES.items()},
    )
    return comparisons


@pytest.mark.parametrize("layout", ["tp2", "dp2"])
def test_tokens_and_losses_are_those_of_one_process(
    layout: str, compared: dict[str, Comparison]
) -> None:
    found = compared[layout]
    assert found.problems == []
    assert found.same == (16, 16) and found.num_completions == 48


def test_every_engine_decodes_its_own_share(compared: dict[str, Comparison]) -> None:
    """Over two ranks one engine, whose ranks hold half of each layer; else half of the prompts."""
    assert compared["tp2"].own == [16, 16]
    assert compared["dp2"].own == [8, 8]


def test_noise_of_a_rank_is_seen(compared: dict[str, Comparison]) -> None:
    """The second rank draws other tokens at once; the losses, of replayed tokens, stay right."""
    found = compared["own noise"]
    assert found.same == (8, 16)
    assert max(parting["margin"] for parting in found.replayed) > 1e3 * MAX_MARGIN
    assert found.loss < MAX_LOSS_DIFFERENCE
    assert any("is no tie" in line for line in found.problems)


def test_a_wrong_weight_is_seen(compared: dict[str, Comparison]) -> None:
    """By tokens in the first step, and by the losses of tokens that are not its own."""
    found = compared["nudged"]
    assert found.same[0] < 16
    assert found.loss > 2 * MAX_LOSS_DIFFERENCE
    assert any("losses differ" in line for line in found.problems)


@pytest.mark.full
def test_the_example_as_it_is(tmp_path: Path) -> None:
    needed("models/stories260K")
    _, comparisons = compare(["--train.num_steps", "20"], LAYOUTS, tmp_path / "runs", timeout=3600)
    assert [line for found in comparisons.values() for line in found.problems] == []
