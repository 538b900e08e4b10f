"""An engine that fails in one of its calls, by an exception or by never coming back."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gdpo_megatron.rollout.stall import StallLimit
from support.sabotage import Named, Wrapped

CALLS = ("wake", "load_weights", "resident_tensors", "the canary", "sleep")
SHORT = 0.2  # seconds
_LONG = 600.0


def unlimited() -> StallLimit:
    """A limit that nothing reaches, until an engine that hangs shortens it."""
    return StallLimit(
        seconds=_LONG,
        folder=Path("not made"),
        goes_on=str,
        grace_seconds=_LONG,
        margin_seconds=_LONG,
    )


class FailingEngine(Wrapped):
    """Around an engine.

    Args:
        engine: what it hands on to.
        call: of CALLS; it fails in the midst of that.
        kind: "raises" or "hangs".
        limit: becomes SHORT when the engine hangs, so that no other call can reach it.
    """

    def __init__(self, engine: Any, call: str, kind: str, limit: StallLimit):
        super().__init__(engine)
        self._call, self._kind, self._limit = call, kind, limit

    def _reach(self, call: str) -> None:
        if call != self._call:
            return
        if self._kind == "raises":
            raise KeyError("gone")
        object.__setattr__(self._limit, "seconds", SHORT)
        time.sleep(_LONG)

    def wake(self) -> None:
        self._reach("wake")
        self.inner.wake()

    def load_weights(self, tensors: Iterable[Named], version: int) -> None:
        def drawn() -> Iterator[Named]:
            for number, it in enumerate(tensors):
                if number == 3:
                    self._reach("load_weights")
                yield it

        self.inner.load_weights(drawn(), version)

    def resident_tensors(self) -> Iterator[Named]:
        for it in self.inner.resident_tensors():
            yield it
            self._reach("resident_tensors")

    def poll(self) -> Any:
        self._reach("the canary")
        return self.inner.poll()

    def sleep(self) -> None:
        self._reach("sleep")
        self.inner.sleep()
