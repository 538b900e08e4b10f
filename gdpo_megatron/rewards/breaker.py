"""The circuit breaker: a reward that fails on most rows is broken, and the run must not go on.

A few rows that cannot be judged are left out of the advantages. When most are, the groups that are
left are no fair sample of what the policy does, and what is wrong is the reward or what it needs:
that is for a person to mend, so the run stops instead of learning from the rest.
"""

from __future__ import annotations

from collections.abc import Iterator

from gdpo_megatron.errors import InputError
from gdpo_megatron.rewards.report import RewardReport
from gdpo_megatron.types import RewardMatrix

MIN_ROWS = 8
"""Fewer rows count as so many: one row that fails, of two, says little."""

_NOT_ITS_OWN = ("condition missing", "completion aborted")
_NUM_REASONS = 3


class TooManyInvalid(InputError):
    """Rewards whose share of invalid rows is above `reward_suite.max_invalid_fraction`."""


def check_invalid(
    rewards: RewardMatrix, num_not_applicable: list[int], report: RewardReport, max_fraction: float
) -> None:
    """Look at the rows of a step; the outcome is the same on all ranks.

    Args:
        rewards: of the whole step.
        num_not_applicable: per reward, rows that it says nothing about.
        report: of the same step.
        max_fraction: `reward_suite.max_invalid_fraction`.

    Raises:
        TooManyInvalid: a reward is above it; names it, its commonest reasons, the first traceback.
    """
    problems: list[str] = []
    for name, not_applicable in zip(rewards.names, num_not_applicable, strict=True):
        num_rows = len(rewards.values) - not_applicable
        reasons = {
            reason: count
            for reason, count in report.num_invalid.get(name, {}).items()
            if reason not in _NOT_ITS_OWN  # told by the reward that the condition looks at
        }
        num_invalid = sum(reasons.values())
        if num_invalid > max_fraction * max(num_rows, MIN_ROWS):
            problems += _told(name, num_invalid, num_rows, reasons, report, max_fraction)
    if problems:
        raise TooManyInvalid(problems)


def _told(
    name: str,
    num_invalid: int,
    num_rows: int,
    reasons: dict[str, int],
    report: RewardReport,
    max_fraction: float,
) -> Iterator[str]:
    commonest = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:_NUM_REASONS]
    shown = ", ".join(f"{reason} ({count})" for reason, count in commonest)
    yield (
        f"reward '{name}': {num_invalid} of {num_rows} rows are invalid, more than "
        f"reward_suite.max_invalid_fraction {max_fraction:g} allows: {shown}"
    )
    if name in report.tracebacks:
        yield f"reward '{name}', first traceback:\n{report.tracebacks[name]}"
