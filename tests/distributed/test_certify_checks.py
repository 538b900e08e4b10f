"""Each check of `gdpo-megatron certify` passes, and fails when what it checks is wrong.

On one rank, in one launch. The checks of layouts: that their mistakes exceed the limits is in
test_layouts.py; of whole runs: tests/unit/certify. Not covered: GPUs, vLLM.
"""

from __future__ import annotations

from typing import Any

import pytest
from rank_harness import run_ranks

from gdpo_megatron.certify.check import findings_from

pytestmark = pytest.mark.distributed

RIGHT = ("logits", "round_trip", "weight_sync", "sleep_wake", "fp8")
# Mistake -> what is said of it: the name of a number that is beyond its bound, or an error.
WRONG = {
    "logits, slower rotation": "qwen3_tied: logits",
    "round_trip, wrong heads": "qwen3_tied: tensors that differ",
    "weight_sync, swapped": "SyncFault",
    "sleep_wake, keeps weights": "held asleep: growth",
    "fp8, wrong scale": "max_logprob_diff",
    "fp8, none": "that of FP8 at all",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("certify")
    (folder / "cases").mkdir()
    (answer,) = run_ranks("rank_certify:run", 1, folder / "run", folder=str(folder / "cases"))
    return answer


@pytest.mark.parametrize("check", RIGHT)
def test_what_is_right_passes(check: str, found: dict[str, Any]) -> None:
    assert "error" not in found[check], found[check]
    measured = findings_from(found[check]).measured
    assert measured and [str(it) for it in measured if not it.good] == []


@pytest.mark.parametrize("mistake", WRONG)
def test_what_is_wrong_fails(mistake: str, found: dict[str, Any]) -> None:
    answer, said = found[mistake], WRONG[mistake]
    if "error" in answer:
        assert said in answer["error"]
    else:
        bad = [it.name for it in findings_from(answer).measured if not it.good]
        assert any(said in name for name in bad), bad
