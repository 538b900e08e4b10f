"""Peak memory of the phases of a step.

What keeps a peak (the kernel for a process, torch's allocator for a device) can be told to forget
it. It is asked and told at both ends of every phase, so each phase is charged with its own peak.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_FORGET_PEAK = "5"  # proc_pid_clear_refs(5)


@dataclass(frozen=True, slots=True)
class MemoryProbe:
    """What keeps a peak.

    Args:
        kind: of memory, for the name of the metric.
        peak: bytes at most since it was told to forget, or since the process started.
        forget: lets the peak begin at what is held now; None where that is not possible.
    """

    kind: str
    peak: Callable[[], int]
    forget: Callable[[], None] | None


def host_probe() -> MemoryProbe:
    """Resident memory of this process, what the kernel shares and what malloc keeps included."""
    if not _STATUS.exists():  # not Linux, but a system whose ru_maxrss is KiB too
        return MemoryProbe("host_peak", _since_the_start, None)
    try:
        _forget()
    except OSError:  # a container may have /proc for reading only
        return MemoryProbe("host_peak", _resident, None)
    return MemoryProbe("host_peak", _resident, _forget)


def _resident() -> int:
    line = next(it for it in _STATUS.read_text().splitlines() if it.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _forget() -> None:
    _CLEAR.write_text(_FORGET_PEAK)


def _since_the_start() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class PhaseMemory:
    """Peaks of named phases since the last `take`, and of the process since it started.

    Phases may nest; the peak of an inner one is part of the outer one's too. Of a phase that is
    entered again, it is the larger one.

    Args:
        probe: what keeps the peak.
    """

    def __init__(self, probe: MemoryProbe):
        self._probe = probe
        self._most = 0
        self._peaks: dict[str, int] = {}
        self._open: list[str] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Charge `phase` with the peak within the block."""
        self._charge()
        self._open.append(phase)
        try:
            yield
        finally:
            self._charge()
            self._open.remove(phase)

    def take(self) -> dict[str, float]:
        """Bytes by the name of their metric; the phases start anew.

        Returns:
            `memory/{kind}_bytes`, and where a peak can be forgotten `memory/{phase}/{kind}_bytes`.
        """
        self._charge()
        kind = self._probe.kind
        taken, self._peaks = self._peaks, {}
        values = {f"memory/{phase}/{kind}_bytes": float(peak) for phase, peak in taken.items()}
        return {f"memory/{kind}_bytes": float(self._most), **values}

    def _charge(self) -> None:
        peak = self._probe.peak()
        self._most = max(self._most, peak)
        if self._probe.forget is None:
            return
        for phase in self._open:
            self._peaks[phase] = max(self._peaks.get(phase, 0), peak)
        self._probe.forget()
