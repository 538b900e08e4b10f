"""Calling a reward function: whatever comes back, or does not, becomes results.

Everything is caught, BaseException too: a sys.exit() in a reward is a row that cannot be judged,
not the end of the process that runs it.
"""

from __future__ import annotations

import inspect
import os
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from gdpo_megatron.rewards.base import (
    Invalid,
    RewardResult,
    RewardSample,
    as_result,
    collect_events,
    plain_value,
)
from gdpo_megatron.rewards.resolve import ResolvedReward

_MESSAGE_CHARACTERS = 200
_TRACEBACK_CHARACTERS = 8000


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a call came to.

    Args:
        results: one per sample.
        seconds: wall clock of the call.
        events: what the reward counted, see `count_event`.
    """

    results: Sequence[RewardResult]
    seconds: float
    events: Mapping[str, int]


def call(reward: ResolvedReward, samples: Sequence[RewardSample]) -> Outcome:
    """Call a sync reward with one sample, or with all of a group in the batch form."""
    process, began = os.getpid(), time.perf_counter()
    with collect_events() as events:
        try:
            results = _checked_all(reward, reward.fn.function(_argument(reward, samples),
                                   **reward.args), len(samples))  # fmt: skip
        except BaseException as error:
            results = [_fault(error)] * len(samples)
    if os.getpid() != process:
        os._exit(0)  # the reward forked, and its child came back here too
    return Outcome(results, time.perf_counter() - began, dict(events))


async def call_async(
    reward: ResolvedReward,
    samples: Sequence[RewardSample],
    timed: Callable[[Awaitable[Any]], Awaitable[Any]],
) -> Outcome:
    """The same for an async reward.

    Args:
        reward: whose function gives an awaitable.
        samples: as for `call`.
        timed: awaits what it is given; raises `CallTimeout` when that takes too long.
    """
    began = time.perf_counter()
    with collect_events() as events:
        try:
            awaitable = reward.fn.function(_argument(reward, samples), **reward.args)
            results = _checked_all(reward, await timed(awaitable), len(samples))
        except CallTimeout as error:
            results = [error.verdict] * len(samples)
        except BaseException as error:
            results = [_fault(error)] * len(samples)
    return Outcome(results, time.perf_counter() - began, dict(events))


class CallTimeout(Exception):
    """An async call was cancelled; `verdict` is what its rows are."""

    def __init__(self, verdict: Invalid):
        super().__init__(str(verdict))
        self.verdict = verdict


def _argument(reward: ResolvedReward, samples: Sequence[RewardSample]) -> Any:
    return samples if reward.fn.batch else samples[0]


def _checked_all(reward: ResolvedReward, values: object, num_samples: int) -> list[RewardResult]:
    if not reward.fn.batch:
        return [_checked(values)]
    if inspect.iscoroutine(values):
        return [_checked(values)] * num_samples
    values = plain_value(values)
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        fault = Invalid(f"returned {type(values).__name__}", "a batch reward returns a list")
        return [fault] * num_samples
    results = [_checked(value) for value in cast("Sequence[object]", values)]
    if len(results) != num_samples:
        detail = f"{len(results)} results for {num_samples} samples"
        return [Invalid("wrong number of results", detail)] * num_samples
    return results


def _checked(value: object) -> RewardResult:
    if inspect.iscoroutine(value):
        value.close()  # never to be awaited: without this, a warning from the interpreter
        return Invalid("returned coroutine", "declare the function with 'async def'")
    return as_result(value)


def _fault(error: BaseException) -> Invalid:
    try:
        message = str(error)
    except Exception:
        message = "(its message cannot be shown)"
    trace = "".join(traceback.format_exception(error))
    return Invalid(
        f"raised {type(error).__name__}",
        cut(message, _MESSAGE_CHARACTERS),
        # The end says where; the middle of a deep recursion says nothing.
        trace if len(trace) <= _TRACEBACK_CHARACTERS else f"...{trace[-_TRACEBACK_CHARACTERS:]}",
    )


def cut(text: str, limit: int) -> str:
    """The text, cut with "..." where it is longer than `limit`."""
    return text if len(text) <= limit else f"{text[:limit]}..."
