"""Ends a call of an engine in which nothing happens any more.

A thread looks at the engine's progress while the main thread is in one of its calls: the tokens
that it draws, the tensors that it takes. When that stands still for too long, the main thread gets
an exception, which a Python loop and most waits take. A call that does not come back even then (a
collective whose partner is gone, a device that hangs) cannot be left by any exception: the stacks
of all threads are written, and the process ends, which takes the other ranks along. Should a call
keep even this thread from running, faulthandler's own timer, which needs no interpreter, does the
same.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Generic, TypeVar

import psutil

from gdpo_megatron.rollout.base import RolloutEngine
from gdpo_megatron.rollout.failure import EngineStalled

GRACE_SECONDS = 30.0
"""At most, from the exception to the end of a process that does not take it."""

MARGIN_SECONDS = 60.0
"""From there to the end by faulthandler, for a process in which no thread of Python runs."""

NO_TOKEN = "no token"
"""What is told of a generation that stalls."""

_EXIT_CODE = 1
_STDERR = 2  # the file itself, whatever sys.stderr is

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class StallLimit:
    """When a call counts as stalled, and where it is told.

    Args:
        seconds: without progress; `rollout.stall_timeout_seconds`.
        folder: for the stacks of a process that has to be ended.
        goes_on: what a run that ends like this goes on from, for the message.
        grace_seconds: until the process is ended, when the exception is not taken; by default as
            long again, at most GRACE_SECONDS.
        margin_seconds: until faulthandler ends it, when no thread of Python runs.
    """

    seconds: float
    folder: Path
    goes_on: Callable[[], str]
    grace_seconds: float | None = None
    margin_seconds: float = MARGIN_SECONDS

    @property
    def total_seconds(self) -> float:
        """Until the process is ended."""
        grace = self.grace_seconds
        return self.seconds + (min(GRACE_SECONDS, self.seconds) if grace is None else grace)


class StallWatch:
    """Watches calls of an engine in the main thread; a context of several of them.

    Args:
        engine: whose token count is progress.
        limit: see there; None watches nothing.
        rank: for the messages.
    """

    def __init__(self, engine: RolloutEngine, limit: StallLimit | None, rank: int):
        self._engine, self._limit, self._rank = engine, limit, rank
        self._steps = 0
        self._missing: str | None = None  # what a call has to bring; None outside of calls
        self._told = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stall watch", daemon=True)

    def __enter__(self) -> StallWatch:
        if self._limit is not None:
            self._previous = signal.signal(signal.SIGALRM, self._interrupt)
            self._arm(self._limit)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._limit is not None:
            self._done.set()
            self._thread.join()
            signal.signal(signal.SIGALRM, self._previous)

    @contextmanager
    def call(self, missing: str) -> Iterator[None]:
        """Around a call of the engine; raises EngineStalled in it where it makes no progress.

        Args:
            missing: what is not there then, for the message.
        """
        self._steps += 1
        self._missing = missing
        try:
            yield
        finally:
            self._missing = None

    def outside(self, items: Iterator[T]) -> Iterator[T]:
        """Items that the engine draws within `call`: each is progress, and making it not its time.

        No exception is raised while an item is made.
        """
        return _Outside(self, items)

    def counted(self, items: Iterator[T]) -> Iterator[T]:
        """Items that the engine makes within `call`: each is progress."""
        for item in items:
            self._steps += 1
            yield item

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._missing is not None and not self._told:
            assert self._limit is not None
            self._told = True
            raise EngineStalled(
                f"{self._missing} for {self._limit.seconds:g} s (rollout.stall_timeout_seconds)"
            )

    def _watch(self) -> None:
        limit = self._limit
        assert limit is not None
        tick = min(1.0, limit.seconds / 8)
        seen, still, stalled, last = None, 0.0, False, time.monotonic()
        try:
            while not self._done.wait(tick):
                self._arm(limit)
                now, progress = time.monotonic(), (self._steps, self._engine.num_generated_tokens)
                # A machine that sleeps, or a process that is stopped, is no engine that hangs.
                still, last = still + min(now - last, 2 * tick), now
                missing = self._missing
                if missing is None or progress != seen:
                    seen, still, stalled = progress, 0.0, False
                elif stalled and still > limit.total_seconds:
                    self._end(limit, missing)
                elif not stalled and still > limit.seconds:
                    stalled = True
                    faulthandler.dump_traceback(file=_STDERR)
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _arm(self, limit: StallLimit) -> None:
        """Set the timer of last resort, later than all that this thread would do itself."""
        seconds = limit.total_seconds + limit.margin_seconds
        faulthandler.dump_traceback_later(seconds, exit=True, file=_STDERR)

    def _end(self, limit: StallLimit, missing: str) -> None:
        path = limit.folder / f"stalled_rank_{self._rank:05d}.txt"
        limit.folder.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            faulthandler.dump_traceback(file=file)
        print(
            f"gdpo-megatron: the rollout engine of rank {self._rank} hangs: {missing} for "
            f"{limit.total_seconds:g} s (rollout.stall_timeout_seconds {limit.seconds:g}), and it "
            f"cannot be interrupted; its stacks are in {path}; {limit.goes_on()}",
            file=sys.stderr,
            flush=True,
        )
        # What was started here (a checkpoint's writer waits for work) would outlive this process.
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
        os._exit(_EXIT_CODE)  # an exit handler could wait for what hangs


class _Outside(Generic[T]):
    """See StallWatch.outside. No generator, which an exception between two items would end."""

    def __init__(self, watch: StallWatch, items: Iterator[T]):
        self._watch, self._items = watch, items

    def __iter__(self) -> _Outside[T]:
        return self

    def __next__(self) -> T:
        watch = self._watch
        missing, watch._missing = watch._missing, None  # pyright: ignore[reportPrivateUsage]
        try:
            return next(self._items)
        finally:
            watch._steps += 1  # pyright: ignore[reportPrivateUsage]
            watch._missing = missing  # pyright: ignore[reportPrivateUsage]
