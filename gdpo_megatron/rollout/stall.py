"""Ends a generation in which nothing happens any more.

A thread looks at the engine's token count while the main thread is in one of its calls. When it
stands still for too long, the main thread gets an exception, which a Python loop and most waits
take. A call that does not come back even then (a collective whose partner is gone, a device that
hangs) cannot be left by any exception: the stacks of all threads are written, and the process ends,
which takes the other ranks along. Should a call keep even this thread from running, faulthandler's
own timer, which needs no interpreter, does the same.
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

import psutil

from gdpo_megatron.rollout.base import RolloutEngine
from gdpo_megatron.rollout.failure import EngineStalled

GRACE_SECONDS = 30.0
"""At most, from the exception to the end of a process that does not take it."""

_EXIT_CODE = 1
_STDERR = 2  # the file itself, whatever sys.stderr is


@dataclass(frozen=True, slots=True, kw_only=True)
class StallLimit:
    """When a generation counts as stalled, and where it is told.

    Args:
        seconds: without a new token; `rollout.stall_timeout_seconds`.
        folder: for the stacks of a process that has to be ended.
        goes_on: what a run that ends like this goes on from, for the message.
    """

    seconds: float
    folder: Path
    goes_on: Callable[[], str]

    @property
    def grace_seconds(self) -> float:
        """Until the process is ended, when the exception is not taken."""
        return min(GRACE_SECONDS, self.seconds)


class StallWatch:
    """Watches the calls of an engine in the main thread; a context of one generation.

    Args:
        engine: whose token count is progress.
        limit: see there; None watches nothing.
        rank: for the messages.
    """

    def __init__(self, engine: RolloutEngine, limit: StallLimit | None, rank: int):
        self._engine, self._limit, self._rank = engine, limit, rank
        self._calls = 0
        self._in_call = False
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
    def call(self) -> Iterator[None]:
        """Around a call of the engine; raises EngineStalled in it where it makes no progress."""
        self._calls += 1
        self._in_call = True
        try:
            yield
        finally:
            self._in_call = False

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._in_call and not self._told:
            assert self._limit is not None
            self._told = True
            raise EngineStalled(
                f"no token for {self._limit.seconds:g} s (rollout.stall_timeout_seconds)"
            )

    def _watch(self) -> None:
        limit = self._limit
        assert limit is not None
        tick = min(1.0, limit.seconds / 8)
        seen, still, stalled, last = None, 0.0, False, time.monotonic()
        try:
            while not self._done.wait(tick):
                self._arm(limit)
                now, progress = time.monotonic(), (self._calls, self._engine.num_generated_tokens)
                # A machine that sleeps, or a process that is stopped, is no engine that hangs.
                still, last = still + min(now - last, 2 * tick), now
                if not self._in_call or progress != seen:
                    seen, still, stalled = progress, 0.0, False
                elif stalled and still > limit.seconds + limit.grace_seconds:
                    self._end(limit)
                elif not stalled and still > limit.seconds:
                    stalled = True
                    faulthandler.dump_traceback(file=_STDERR)
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _arm(self, limit: StallLimit) -> None:
        """Set the timer of last resort, later than all that this thread would do itself."""
        seconds = limit.seconds + 2 * limit.grace_seconds + 1
        faulthandler.dump_traceback_later(seconds, exit=True, file=_STDERR)

    def _end(self, limit: StallLimit) -> None:
        path = limit.folder / f"stalled_rank_{self._rank:05d}.txt"
        limit.folder.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            faulthandler.dump_traceback(file=file)
        print(
            f"gdpo-megatron: the rollout engine of rank {self._rank} has drawn no token for "
            f"{limit.seconds + limit.grace_seconds:g} s (rollout.stall_timeout_seconds "
            f"{limit.seconds:g}) and cannot be interrupted; its stacks are in {path}; "
            f"{limit.goes_on()}",
            file=sys.stderr,
            flush=True,
        )
        # What was started here (a checkpoint's writer waits for work) would outlive this process.
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
        os._exit(_EXIT_CODE)  # an exit handler could wait for what hangs
