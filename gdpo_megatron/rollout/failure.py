"""An engine that fails: noted where it happens, told to all ranks, ended by all of them together.

A rank whose engine raises goes to the collective that ends every generation, where the others come
when they are done. So nobody waits for a rank that is gone, and all raise the same `EngineFailure`.
A sync does likewise (weight_sync/proof.py).
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gdpo_megatron.errors import InputError

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")


class EngineStalled(RuntimeError):
    """An engine has made no progress for longer than `rollout.stall_timeout_seconds`."""


class EngineFailure(InputError):
    """Engines that failed; equal on all ranks. Their state is unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureReport:
    """What one rank saw of its engine's failure.

    Args:
        rank: of the run.
        replica: its engine.
        num_unfinished: requests that the engine had not returned.
        num_submitted: requests that it was given.
        reason: see `reason_of`.
    """

    rank: int
    replica: int
    num_unfinished: int
    num_submitted: int
    reason: str

    @classmethod
    def of(
        cls,
        error: Exception,
        *,
        rank: int,
        replica: int,
        num_submitted: int,
        num_returned: int,
    ) -> FailureReport:
        """Describe an exception that an engine raised, here and now."""
        report = cls(
            rank=rank,
            replica=replica,
            num_unfinished=num_submitted - num_returned,
            num_submitted=num_submitted,
            reason=reason_of(error),
        )
        tell(report.told(), error)
        return report

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def told(self) -> str:
        """One line for a person."""
        return (
            f"rollout engine {self.replica} failed on rank {self.rank} with {self.num_unfinished} "
            f"of {self.num_submitted} completions unfinished: {self.reason}"
        )


def engine_failure(reports: Iterable[dict[str, Any]]) -> EngineFailure:
    """The error that all ranks raise, from the reports of those that failed."""
    return EngineFailure([FailureReport(**report).told() for report in reports])


def reason_of(error: Exception) -> str:
    """Type and text of an engine's exception, and what to try, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}".removesuffix(": ") + f"; {_advice(error)}"


def tell(what: str, error: Exception) -> None:
    """Print an engine's exception where it happens.

    At once: where ranks share the engine, its partners may never come to hear of it.
    """
    trace = "".join(traceback.format_exception(error))
    print(f"{what}\n{trace}", file=sys.stderr, flush=True)


def _advice(error: Exception) -> str:
    text = str(error).lower()
    if isinstance(error, EngineStalled):
        return "see its stacks above; raise rollout.stall_timeout_seconds if it was only slow"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        phrase in text for phrase in _OUT_OF_MEMORY
    ):
        return (
            "out of memory: lower rollout.max_concurrent_sequences or "
            "rollout.max_completion_tokens, or raise rollout.tensor_parallel_size"
        )
    return "its traceback is above"
