"""What happened while rewards ran, beside the scores: faults, time, workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

TIMEOUTS = ("sample timeout", "step timeout", "blocked the event loop")
"""Reasons that mean a reward was not done in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardReport:
    """Of one `collect`, or of several.

    Args:
        num_invalid: reward name -> reason -> rows; not applicable is not among them.
        tracebacks: reward name -> that of the first row that raised.
        events: reward name -> what it counted itself -> how often.
        seconds: reward name -> time in its function, over all workers.
        wait_seconds: time from the end of generation to the last score.
        num_restarts: workers that were killed or died.
        num_recycled: workers that were replaced because of what their calls had left behind.
        num_retries: calls made again because their worker had ended.
    """

    num_invalid: Mapping[str, Mapping[str, int]] = field(
        default_factory=dict[str, Mapping[str, int]]
    )
    tracebacks: Mapping[str, str] = field(default_factory=dict[str, str])
    events: Mapping[str, Mapping[str, int]] = field(default_factory=dict[str, Mapping[str, int]])
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    wait_seconds: float = 0.0
    num_restarts: int = 0
    num_recycled: int = 0
    num_retries: int = 0

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def over_engines(cls, reports: Sequence[RewardReport]) -> RewardReport:
        """Of engines that worked at the same time: one waits no longer than the slowest."""
        return cls._joined(reports, max)

    @classmethod
    def over_rounds(cls, reports: Sequence[RewardReport]) -> RewardReport:
        """Of rounds that came one after the other."""
        return cls._joined(reports, sum)

    @classmethod
    def _joined(
        cls, reports: Sequence[RewardReport], waits: Callable[[Iterable[float]], float]
    ) -> RewardReport:
        seconds = Counter[str]()
        for report in reports:
            seconds.update(report.seconds)  # pyright: ignore[reportArgumentType]
        return cls(
            num_invalid=_summed(report.num_invalid for report in reports),
            tracebacks={n: t for report in reversed(reports) for n, t in report.tracebacks.items()},
            events=_summed(report.events for report in reports),
            seconds=dict(seconds),
            wait_seconds=waits([report.wait_seconds for report in reports]),
            num_restarts=sum(report.num_restarts for report in reports),
            num_recycled=sum(report.num_recycled for report in reports),
            num_retries=sum(report.num_retries for report in reports),
        )

    def num_timeouts(self, name: str) -> int:
        """Rows of a reward that were not done in time."""
        return sum(self.num_invalid.get(name, {}).get(reason, 0) for reason in TIMEOUTS)


def _summed(tables: Iterable[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    total: dict[str, Counter[str]] = {}
    for table in tables:
        for name, counts in table.items():
            total.setdefault(name, Counter[str]()).update(counts)
    return {name: dict(counts) for name, counts in total.items()}
