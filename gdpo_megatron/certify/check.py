"""What a check is, what it measures, and how it ends."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from gdpo_megatron.certify.job import Job
    from gdpo_megatron.platform import Platform

Relation = Literal["<=", ">=", ">", "=="]

# Of a value that is no number none holds.
_HOLDS: Mapping[Relation, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    ">": operator.gt,
    "==": operator.eq,
}


class Status(StrEnum):
    """How a check ended."""

    PASS = "pass"
    FAIL = "fail"
    CANNOT_RUN = "cannot run"
    """Something that it needs is not here."""


class CheckFailed(Exception):
    """What a check runs did not come to its end; the message says why."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One number, and the bound that it is held to.

    Args:
        name: of what was measured.
        value: what it is.
        relation: how it has to stand to the bound.
        bound: the bound.
    """

    name: str
    value: float
    relation: Relation
    bound: float

    @property
    def good(self) -> bool:
        """Whether it is within its bound."""
        return _HOLDS[self.relation](self.value, self.bound)

    def __str__(self) -> str:
        return f"{self.name} {self.value:.4g} {self.relation} {self.bound:.4g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What a check brings back.

    Args:
        measured: at least one number.
        notes: what a reader has to know of them.
    """

    measured: Sequence[Measured]
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What checks are run with.

    Args:
        platform: the machine.
        num_devices: GPUs; on a machine without, processes.
        model: a model folder; None where none was given.
        data: rows for it.
    """

    platform: Platform
    num_devices: int
    model: Path | None = None
    data: Path | None = None


def nothing_missing(situation: Situation) -> str | None:
    """What a check needs that runs everywhere."""
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One row of the table.

    Args:
        name: for the command line and the certificate.
        proves: in a line.
        run: does it; raises CheckFailed where what it starts fails.
        missing: what it needs and is not here, None where nothing is missing.
        seconds: after which everything that it has started is ended, and it has failed.
    """

    name: str
    proves: str
    run: Callable[[Job], Findings]
    missing: Callable[[Situation], str | None] = nothing_missing
    seconds: float = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a check ended.

    Args:
        check: its name.
        proves: what it is there for.
        status: how it ended.
        seconds: that it took, on the clock.
        reason: why it failed or cannot run; None of one that passed.
        measured: its numbers; none where it did not come that far.
        notes: see Findings.
    """

    check: str
    proves: str
    status: Status
    seconds: float
    reason: str | None = None
    measured: Sequence[Measured] = ()
    notes: Sequence[str] = ()

    @property
    def nearest(self) -> Measured | None:
        """The number that fills most of its bound, of those that have an upper one."""
        upper = [it for it in self.measured if it.relation == "<=" and it.bound > 0]
        return max(upper, key=lambda it: it.value / it.bound, default=None)


def judge(check: Check, findings: Findings, seconds: float) -> Outcome:
    """Hold what was found to its bounds."""
    bad = [str(it) for it in findings.measured if not it.good]
    reason = f"not so: {'; '.join(bad)}" if bad else None
    if not findings.measured:
        reason = "nothing was measured"
    return Outcome(
        check=check.name,
        proves=check.proves,
        status=Status.PASS if reason is None else Status.FAIL,
        seconds=seconds,
        reason=reason,
        measured=tuple(findings.measured),
        notes=tuple(findings.notes),
    )


def findings_dict(measured: Sequence[Measured], notes: Sequence[str] = ()) -> dict[str, Any]:
    """What a rank gives back, for JSON."""
    return {"measured": [asdict(it) for it in measured], "notes": list(notes)}


def findings_from(answer: Mapping[str, Any]) -> Findings:
    """Of what `findings_dict` made."""
    measured = [Measured(**it) for it in answer["measured"]]
    return Findings(measured=measured, notes=answer["notes"])
