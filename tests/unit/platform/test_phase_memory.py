"""Peaks of phases: with a probe whose numbers a test sets, and with the kernel's.

Not covered: torch's allocator on a GPU, which is asked by the same code.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gdpo_megatron.observability.metrics import find_metric
from gdpo_megatron.platform import memory
from gdpo_megatron.platform.cpu import CpuPlatform
from gdpo_megatron.platform.cuda import CudaPlatform
from gdpo_megatron.platform.memory import MemoryProbe, PhaseMemory, host_probe

MIB = 2**20


class Held:
    """Memory that a test takes and gives back."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def take(self, amount: int) -> None:
        self.now += amount
        self.most = max(self.most, self.now)

    def forget(self) -> None:
        self.most = self.now

    def probe(self) -> MemoryProbe:
        return MemoryProbe("kind", lambda: self.most, self.forget)


def test_each_phase_is_charged_with_its_own_peak() -> None:
    held = Held()
    phases = PhaseMemory(held.probe())
    held.take(50)
    held.take(-40)
    with phases("first"):
        held.take(20)
        held.take(-15)
    with phases("second"):
        held.take(3)
    assert phases.take() == {
        "memory/kind_bytes": 50,
        "memory/first/kind_bytes": 30,
        "memory/second/kind_bytes": 18,
    }
    # The phases start anew, the whole does not.
    with phases("second"):
        held.take(-10)
    assert phases.take() == {"memory/kind_bytes": 50, "memory/second/kind_bytes": 18}


def test_an_inner_phase_counts_for_the_outer_one_and_a_second_time_for_the_larger() -> None:
    held = Held()
    phases = PhaseMemory(held.probe())
    with phases("outer"):
        held.take(5)
        with phases("inner"):
            held.take(90)
            held.take(-85)
        held.take(1)
    with phases("inner"):
        held.take(4)
    values = phases.take()
    assert values["memory/outer/kind_bytes"] == values["memory/inner/kind_bytes"] == 95
    with pytest.raises(ZeroDivisionError), phases("broken"):
        held.take(1000)
        held.take(-1000)
        raise ZeroDivisionError
    assert phases.take()["memory/broken/kind_bytes"] == 1015


def test_without_forgetting_there_is_only_the_whole() -> None:
    held = Held()
    phases = PhaseMemory(MemoryProbe("kind", lambda: held.most, None))
    with phases("first"):
        held.take(7)
    assert phases.take() == {"memory/kind_bytes": 7}


def test_the_kernels_peak_of_a_phase() -> None:
    probe = host_probe()
    if probe.forget is None:
        # Right: what is done without it is the test above; here the kernel itself is asked.
        pytest.skip("this kernel or container does not let a process forget its peak")
    phases = PhaseMemory(probe)
    with phases("large"):
        block = torch.ones(256 * MIB // 8, dtype=torch.float64)
        del block  # as large as this, it goes back to the kernel
    with phases("small"):
        pass
    values = phases.take()
    large, small = (values[f"memory/{name}/host_peak_bytes"] for name in ("large", "small"))
    # The kernel's counts of pages are late by less than this.
    assert 200 * MIB < large - small < 312 * MIB
    assert values["memory/host_peak_bytes"] >= large
    for name in values:
        assert "Peak memory" in find_metric(name).definition


def test_a_folder_of_the_kernel_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "no" / "such")
    probe = host_probe()
    assert probe.forget is None and probe.peak() > MIB
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    assert host_probe().peak() > MIB


def test_the_platforms_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CpuPlatform().memory_probe().kind == "host_peak"
    forgotten: list[str] = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 * MIB)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: forgotten.append("yes"))
    phases = PhaseMemory(CudaPlatform().memory_probe())
    with phases("update"):
        pass
    assert phases.take() == {
        "memory/device_peak_bytes": 5 * MIB,
        "memory/update/device_peak_bytes": 5 * MIB,
    }
    assert len(forgotten) == 3
