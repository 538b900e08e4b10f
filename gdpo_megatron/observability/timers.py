"""Wall-clock time of the phases of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PhaseTimers:
    """Seconds spent in named phases since the last `take`.

    Phases may nest; the time of an inner one is part of the outer one's too. A phase that is
    entered again adds up.

    Args:
        clock: seconds that never go back.
        synchronize: waits for the device's queued work; called at both ends of a phase, so that a
            phase is charged with its own work and not with that of the phase before.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        synchronize: Callable[[], None] | None = None,
    ):
        self._clock = clock
        self._synchronize = synchronize
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the block as `phase`; a phase within itself raises ValueError."""
        if phase in self._open:
            raise ValueError(f"phase '{phase}' is entered within itself")
        self._wait()
        start = self._clock()
        self._open.append(phase)
        try:
            yield
            # Not after an exception: waiting for a broken device would hide the error.
            self._wait()
        finally:
            self._open.remove(phase)
            self._seconds[phase] = self._seconds.get(phase, 0.0) + self._clock() - start

    def take(self) -> dict[str, float]:
        """Seconds per phase, in the order of their first end, and start anew.

        Raises:
            ValueError: called within a phase.
        """
        if self._open:
            raise ValueError(f"timers are taken within phase '{self._open[-1]}'")
        taken, self._seconds = self._seconds, {}
        return taken

    def _wait(self) -> None:
        if self._synchronize is not None:
            self._synchronize()
