"""When a reward counts as broken, and how reports are added up."""

from __future__ import annotations

import pytest
import torch

from gdpo_megatron.rewards.breaker import MIN_ROWS, TooManyInvalid, check_invalid
from gdpo_megatron.rewards.report import RewardReport
from gdpo_megatron.types import RewardMatrix


def broken(
    num_rows: int, num_invalid: dict[str, dict[str, int]], max_fraction: float, *, absent: int = 0
) -> list[str]:
    """Problems of a step whose rewards have these invalid rows."""
    names, shape = tuple(num_invalid), (num_rows, len(num_invalid))
    group_ids = torch.arange(num_rows)
    matrix = RewardMatrix(names, torch.zeros(shape), torch.ones(shape, dtype=torch.bool), group_ids)
    report = RewardReport(num_invalid=num_invalid, tracebacks={"a": "Traceback: here"})
    try:
        check_invalid(matrix, [absent] * len(names), report, max_fraction)
    except TooManyInvalid as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    ("num_rows", "absent", "num_invalid", "max_fraction", "stops"),
    [
        (100, 0, 50, 0.5, False),
        (100, 0, 51, 0.5, True),
        (100, 80, 10, 0.5, False),  # of the 20 rows that it concerns
        (100, 80, 11, 0.5, True),
        (100, 0, 100, 1.0, False),
        (100, 0, 1, 0.0, True),
        (100, 0, 0, 0.0, False),
        (100, 99, 1, 0.5, False),  # the only row, but one row says little
        (100, 96, 4, 0.5, False),
        (100, 95, 5, 0.5, True),
    ],
)
def test_the_bound(num_rows: int, absent: int, num_invalid: int, max_fraction: float, stops: bool):
    assert MIN_ROWS == 8
    problems = broken(
        num_rows, {"b": {"raised KeyError": num_invalid}}, max_fraction, absent=absent
    )
    assert bool(problems) == stops


def test_the_message_names_reward_reasons_and_traceback():
    faults = {"w": 1, "x": 40, "y": 20, "z": 20, "condition missing": 500}
    first, trace, other = broken(100, {"a": faults, "fine": {}, "b": {"sample timeout": 99}}, 0.5)
    assert first == (
        "reward 'a': 81 of 100 rows are invalid, more than reward_suite.max_invalid_fraction 0.5 "
        "allows: x (40), y (20), z (20)"
    )
    assert trace == "reward 'a', first traceback:\nTraceback: here"
    assert other.startswith("reward 'b': 99 of 100 rows") and other.endswith("sample timeout (99)")


def test_a_reward_is_not_blamed_for_its_condition_or_the_engine():
    assert broken(100, {"b": {"condition missing": 90, "completion aborted": 10}}, 0.5) == []


def test_reports_are_summed_and_the_wait_is_that_of_the_slowest_engine():
    one = RewardReport(
        num_invalid={"a": {"x": 1, "y": 2}, "b": {}}, tracebacks={"a": "first"},
        events={"a": {"e": 3}}, seconds={"a": 1.5, "b": 0.5}, wait_seconds=2.0, num_restarts=1,
        num_recycled=2, num_retries=3,
    )  # fmt: skip
    two = RewardReport(
        num_invalid={"a": {"y": 5}, "b": {"sample timeout": 1, "step timeout": 2}},
        tracebacks={"a": "second", "b": "its"}, seconds={"a": 1.0}, wait_seconds=3.0,
        num_restarts=10,
    )  # fmt: skip
    both = RewardReport.over_engines([one, two])
    assert both == RewardReport(
        num_invalid={"a": {"x": 1, "y": 7}, "b": {"sample timeout": 1, "step timeout": 2}},
        tracebacks={"a": "first", "b": "its"}, events={"a": {"e": 3}},
        seconds={"a": 2.5, "b": 0.5}, wait_seconds=3.0, num_restarts=11, num_recycled=2,
        num_retries=3,
    )  # fmt: skip
    assert both.num_timeouts("b") == 3 and both.num_timeouts("a") == 0
    assert RewardReport.over_rounds([one, two]).wait_seconds == 5.0
    assert RewardReport(**both.as_json()) == both
