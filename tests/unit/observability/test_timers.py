"""Phase timers, on a clock that the test turns by hand."""

from __future__ import annotations

import pytest

from gdpo_megatron.observability.timers import PhaseTimers


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_phases_add_up_and_nest():
    clock = Clock()
    timers = PhaseTimers(clock)
    with timers("rollout"):
        clock.now += 1.0
        with timers("weight_sync"):
            clock.now += 0.5
    clock.now += 7.0
    for _ in range(2):
        with timers("update"):
            clock.now += 2.0
    assert timers.take() == {"weight_sync": 0.5, "rollout": 1.5, "update": 4.0}
    assert timers.take() == {}


def test_work_in_flight_is_charged_to_its_own_phase():
    clock = Clock()
    pending = [3.0]

    def synchronize() -> None:
        clock.now += sum(pending)
        pending.clear()

    timers = PhaseTimers(clock, synchronize)
    with timers("first"):
        clock.now += 1.0
        pending.append(0.25)
    with timers("second"):
        clock.now += 2.0
    assert timers.take() == {"first": 1.25, "second": 2.0}


def test_an_exception_ends_the_phase_without_waiting_for_the_device():
    clock = Clock()
    calls: list[str] = []
    timers = PhaseTimers(clock, lambda: calls.append("wait"))
    with pytest.raises(KeyboardInterrupt), timers("update"):
        clock.now += 1.0
        raise KeyboardInterrupt
    assert calls == ["wait"]
    assert timers.take() == {"update": 1.0}


def test_misuse_is_refused():
    timers = PhaseTimers(Clock())
    with timers("update"):
        with pytest.raises(ValueError, match="'update' is entered within itself"), timers("update"):
            pass
        with pytest.raises(ValueError, match="taken within phase 'update'"):
            timers.take()
