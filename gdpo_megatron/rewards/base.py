"""The contract of a reward: a completion in; a score, "does not apply" or "cannot be judged" out.

A reward is a function `fn(sample, **args)`, sync or async, or, in the batch form, one of a whole
group: `fn(samples, **args) -> one result per sample`. What it returns is

    a finite number        the score (bool counts as 0 or 1; numpy and torch scalars are numbers)
    NOT_APPLICABLE         this reward says nothing about this row (mixed data sets)
    invalid("reason")      the row could not be judged

Anything else (an exception, NaN, a string, None) becomes `invalid` with a reason. Never 0: a fault
of ours would look like a fault of the policy.
"""

from __future__ import annotations

import inspect
import math
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from numbers import Real
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from gdpo_megatron.registry import Registry

if TYPE_CHECKING:  # types.py needs torch; looking a reward up does not
    from gdpo_megatron.types import FinishReason

RewardFunction: TypeAlias = Callable[..., Any]
F = TypeVar("F", bound=RewardFunction)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSample:
    """What a reward sees of a rollout.

    Args:
        completion: the completion alone: no prompt, special tokens already removed.
        prompt: the prompt's text, chat template included.
        answer: the row's `data.answer_key`; None where the row has none.
        metadata: the row's other fields.
        num_tokens: generated tokens, the stop token included.
        finish_reason: "stop", "length" (cut at the token limit) or "abort".
        turns: with an environment, its turns in order: each has "text" (the model's), "observation"
            and "rewards" (name -> value; both the environment's). `completion` is the texts, joined
            by line breaks, and `num_tokens` counts theirs alone.
    """

    completion: str
    prompt: str = ""
    answer: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    num_tokens: int = 0
    finish_reason: FinishReason = "stop"
    turns: Sequence[Mapping[str, Any]] = ()


class NotApplicable(Enum):
    """Type of the one value `NOT_APPLICABLE`."""

    NOT_APPLICABLE = "not applicable"


NOT_APPLICABLE: Final = NotApplicable.NOT_APPLICABLE


@dataclass(frozen=True, slots=True)
class Invalid:
    """A row that could not be judged.

    Args:
        reason: few words from a small set; faults are counted by it.
        detail: what is particular to this row.
        traceback: of the exception, where there was one.
    """

    reason: str
    detail: str = ""
    traceback: str = ""

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


RewardResult: TypeAlias = float | NotApplicable | Invalid

_events: ContextVar[Counter[str] | None] = ContextVar("reward_events", default=None)


def count_event(name: str, number: int = 1) -> None:
    """Count something that a reward wants to be seen in the metrics, beside its score.

    A timeout of the program under test is a score of 0, not a fault, and still worth a line. Call
    it in the reward, in the thread or task that runs it; elsewhere it does nothing.

    Args:
        name: one of few fixed names, in lower case with underscores.
        number: how many.
    """
    events = _events.get()
    if events is not None:
        events[name] += number


@contextmanager
def collect_events() -> Iterator[Counter[str]]:
    """What the suite puts around a call of a reward: yields the counts of its `count_event`."""
    events = Counter[str]()
    token = _events.set(events)
    try:
        yield events
    finally:
        _events.reset(token)


def invalid(reason: str, detail: str = "") -> Invalid:
    """Say that a row cannot be judged, and why; see `Invalid`."""
    return Invalid(reason, detail)


def as_result(value: object) -> RewardResult:
    """Turn what a reward function returned into a result; what is no score becomes `Invalid`."""
    if isinstance(value, NotApplicable | Invalid):
        return value
    plain = plain_value(value)
    if not isinstance(plain, Real):
        return Invalid(f"returned {type(value).__name__}", reprlib.repr(value))
    try:
        score = float(plain)
    except OverflowError:  # an int beyond the largest float
        score = math.inf
    return score if math.isfinite(score) else Invalid("not finite", f"returned {score}")


def plain_value(value: Any) -> Any:
    """The Python value of a numpy or torch one, known by its `tolist`; others as they are."""
    return value.tolist() if callable(getattr(value, "tolist", None)) else value


@dataclass(frozen=True, slots=True)
class RewardFn:
    """A reward function and how to call it.

    Args:
        function: called with a `RewardSample`, or with all of a group if `batch`.
        batch: the batch form.
        is_async: calling it gives an awaitable.
        check_answer: raises ValueError, with the reason, for an answer it could never score.
        stateful: what it returns depends on the calls before, so they are made one at a time, in
            order of sample_id.
    """

    function: RewardFunction
    batch: bool = False
    is_async: bool = False
    check_answer: Callable[[str], object] | None = None
    stateful: bool = False

    @classmethod
    def of(cls, function: RewardFunction) -> RewardFn:
        """The form that `register_reward` noted; the single form for an undecorated function."""
        batch, check_answer, stateful = getattr(function, _FORM, (False, None, False))
        is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004 (an instance with async __call__)
        )
        return cls(function, batch, is_async, check_answer, stateful)


_FORM = "__gdpo_reward_form__"


class _RewardRegistry(Registry[RewardFunction]):
    def add(self, name: str, entry: RewardFunction) -> None:
        # Loading an entry point imports a module whose decorator may have added the same function,
        # and a file may be loaded by its path here and be imported by its name elsewhere.
        there = self._entries.get(name)
        if there is entry:
            return
        if there is not None and _is_reload(there, entry):
            del self._entries[name]
        super().add(name, entry)


def _is_reload(first: RewardFunction, second: RewardFunction) -> bool:
    """Whether two functions, or callable instances, are one definition in two modules."""
    old, new = (it if inspect.isroutine(it) else type(it) for it in (first, second))
    try:
        same_file = inspect.getfile(old) == inspect.getfile(new)
    except (TypeError, OSError):  # built in
        return False
    return same_file and old.__qualname__ == new.__qualname__ and old.__module__ != new.__module__


REWARDS: Final = _RewardRegistry("reward", "gdpo_megatron.rewards")


def register_reward(
    name: str,
    *,
    batch: bool = False,
    check_answer: Callable[[str], object] | None = None,
    stateful: bool = False,
) -> Callable[[F], F]:
    """Return a decorator that registers a reward function and leaves it as it is.

    Args:
        name: what `rewards[].type` calls it.
        batch: the function takes a sequence of samples, all of one group, in order of sample_id.
        check_answer: called with each row's answer when data is loaded; raises ValueError with the
            reason where the answer could never be scored.
        stateful: the function keeps state between calls that its results depend on. It gets a
            worker of its own and is called after generation, in order of sample_id.

    Raises:
        ValueError: the name is taken.

    Example:
        @register_reward("brevity")
        def brevity(sample: RewardSample, limit: int) -> float:
            return float(len(sample.completion) <= limit)
    """

    def decorate(function: F) -> F:
        setattr(function, _FORM, (batch, check_answer, stateful))
        REWARDS.add(name, function)
        return function

    return decorate
