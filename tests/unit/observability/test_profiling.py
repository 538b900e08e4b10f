"""Which steps are profiled, what is written of them, and what would look at nothing.

Not covered: GPUs, and Nsight Systems itself; that NVTX ranges reach it is not known.
"""

from __future__ import annotations

import gzip
import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from gdpo_megatron.config.profiling import ProfilingConfig
from gdpo_megatron.observability.profiling import StepProfiler, profiling_problems


def run(profiler: StepProfiler, steps: range) -> list[list[str]]:
    """Names of the files that were written after each step."""
    written: list[list[str]] = []
    with profiler:
        for number in steps:
            with profiler.step(number), profiler.phase("update"):
                torch.ones(8, 8) @ torch.ones(8, 8)
            with profiler.phase("checkpoint"):
                torch.zeros(3)
            written.append([path.name for path in profiler.write()])
    return written


def ranges(path: Path) -> list[str]:
    """Names of the ranges of a trace, in their order."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    found = [it for it in events if it.get("cat") == "user_annotation"]
    return [it["name"] for it in sorted(found, key=lambda it: it["ts"])]


def test_a_trace_holds_its_steps_and_their_phases(tmp_path: Path):
    config = ProfilingConfig(tool="torch", first_step=2, num_steps=2)
    names = ["steps_2-3_rank0.json.gz", "steps_2-3_rank0.txt"]
    assert run(StepProfiler(config, tmp_path, 0), range(1, 6)) == [[], [], names, [], []]
    # The checkpoint of step 2 is between profiled steps; that of step 3 is after them.
    found = ranges(tmp_path / "profile" / names[0])
    assert found == ["step 2", "update", "checkpoint", "step 3", "update"]
    assert "aten::mm" in (tmp_path / "profile" / names[1]).read_text()


def test_a_run_that_ends_early_leaves_its_trace(tmp_path: Path):
    config = ProfilingConfig(tool="torch", first_step=1, num_steps=100)
    with pytest.raises(KeyboardInterrupt), StepProfiler(config, tmp_path, 0) as profiler:
        with profiler.step(1):
            pass
        with profiler.step(2):
            raise KeyboardInterrupt
    assert ranges(tmp_path / "profile/steps_1-2_rank0.json.gz") == ["step 1", "step 2"]


def test_a_run_that_resumes_within_the_steps_profiles_the_rest(tmp_path: Path):
    config = ProfilingConfig(tool="torch", first_step=2, num_steps=3)
    assert run(StepProfiler(config, tmp_path, 0), range(4, 6))[0][0] == "steps_4-4_rank0.json.gz"


@pytest.mark.parametrize("memory", [False, True])
def test_allocations_are_in_the_trace_where_they_are_asked_for(tmp_path: Path, memory: bool):
    run(StepProfiler(ProfilingConfig(tool="torch", memory=memory), tmp_path, 0), range(1, 3))
    text = gzip.decompress((tmp_path / "profile/steps_2-2_rank0.json.gz").read_bytes()).decode()
    assert ('"[memory]"' in text) == memory


def test_other_ranks_and_runs_without_it_do_nothing(tmp_path: Path):
    for config in (None, ProfilingConfig(tool="torch", ranks=(1, 3))):
        assert run(StepProfiler(config, tmp_path, 0), range(1, 4)) == [[], [], []]
    assert not list(tmp_path.iterdir())


def test_nvtx_ranges_nest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nvtx = pytest.importorskip("nvtx", reason="extra nvtx is not installed")
    seen: list[str] = []

    @contextmanager
    def annotate(message: str, domain: str):
        assert domain == "gdpo_megatron"
        seen.append(f"+{message}")
        yield
        seen.append(f"-{message}")

    monkeypatch.setattr(nvtx, "annotate", annotate)
    config = ProfilingConfig(tool="nvtx", first_step=2)
    assert run(StepProfiler(config, tmp_path, 0), range(1, 4)) == [[], [], []]
    assert seen == [
        "+profiled steps", "+step 2", "+update", "-update", "-step 2", "-profiled steps",
    ]  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (ProfilingConfig(tool="torch"), []),
        (ProfilingConfig(tool="torch", first_step=11), ["profiling.first_step 11 is never"]),
        (ProfilingConfig(tool="torch", ranks=(0, 4)), ["profiling.ranks [0, 4]: choose from 0 to"]),
        (ProfilingConfig(tool="torch", ranks=()), ["profiling.ranks []: choose from 0 to 3"]),
        (ProfilingConfig(tool="nvtx", memory=True), ["profiling.memory has no effect"]),
    ],
)
def test_what_would_look_at_nothing_is_told(config: ProfilingConfig, found: list[str]):
    problems = profiling_problems(config, 10, 4, elsewhere=True)
    assert len(problems) == len(found)
    assert all(it.startswith(text) for it, text in zip(problems, found, strict=True))


def test_a_missing_package_is_told_where_the_run_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = ProfilingConfig(tool="nvtx")
    (problem,) = profiling_problems(config, 10, 1)
    assert problem.endswith("pip install 'gdpo-megatron[nvtx]'")
    assert profiling_problems(config, 10, 1, elsewhere=True) == []
