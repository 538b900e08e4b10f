"""Some steps of a run under a profiler; phases are ranges with their names.

torch's profiler sees the operations of whatever devices there are; what it saw is written when the
last of its steps is done, or the run ends. NVTX ranges are written nowhere: Nsight Systems takes
them from the process that it started.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol

from gdpo_megatron.config.profiling import ProfilingConfig

NVTX_DOMAIN: Final = "gdpo_megatron"
NVTX_CAPTURE: Final = "profiled steps"
"""The range around all of them, for `nsys profile --capture-range=nvtx`."""


class _Tool(Protocol):
    """What looks at steps."""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def write(self, stem: Path) -> list[Path]: ...
    def range(self, name: str) -> AbstractContextManager[object]: ...


class _Torch:
    def __init__(self, config: ProfilingConfig):
        from torch.profiler import profile

        self._profile = profile(
            record_shapes=config.memory, profile_memory=config.memory, acc_events=True
        )

    def start(self) -> None:
        self._profile.start()

    def stop(self) -> None:
        self._profile.stop()

    def write(self, stem: Path) -> list[Path]:
        stem.parent.mkdir(parents=True, exist_ok=True)
        trace, table = stem.with_suffix(".json.gz"), stem.with_suffix(".txt")
        self._profile.export_chrome_trace(str(trace))
        averages = self._profile.key_averages()
        device = any(getattr(it, "self_device_time_total", 0) for it in averages)
        order = "self_device_time_total" if device else "self_cpu_time_total"
        table.write_text(averages.table(sort_by=order, row_limit=60, max_name_column_width=70))
        return [trace, table]

    def range(self, name: str) -> AbstractContextManager[object]:
        from torch.profiler import record_function

        return record_function(name)


class _Nvtx:
    def __init__(self, config: ProfilingConfig):
        import nvtx  # pyright: ignore[reportMissingImports]

        self._annotate: Callable[..., AbstractContextManager[object]] = nvtx.annotate
        self._whole = self.range(NVTX_CAPTURE)

    def start(self) -> None:
        self._whole.__enter__()

    def stop(self) -> None:
        self._whole.__exit__(None, None, None)

    def write(self, stem: Path) -> list[Path]:
        return []

    def range(self, name: str) -> AbstractContextManager[object]:
        return self._annotate(name, domain=NVTX_DOMAIN)


_TOOLS: Final[Mapping[str, Callable[[ProfilingConfig], _Tool]]] = {"torch": _Torch, "nvtx": _Nvtx}


class StepProfiler:
    """Profiles what `profiling` asks for; a rank that it does not name does nothing.

    Use it as a context manager around the steps: a run that ends early still leaves its trace.

    Args:
        config: None profiles nothing.
        run_dir: of the run.
        rank: of this process.
    """

    def __init__(self, config: ProfilingConfig | None, run_dir: Path, rank: int):
        self._config = config if config is not None and rank in config.ranks else None
        self._stem = run_dir / "profile" / f"rank{rank}"
        self._tool: _Tool | None = None
        self._running = False
        self._first = self._last = 0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step of the run, counted from 1."""
        config = self._config
        if config is None or not 0 <= number - config.first_step < config.num_steps:
            yield
            return
        if self._tool is None:
            self._first, self._tool = number, _TOOLS[config.tool](config)
            self._running = True
            self._tool.start()
        self._last = number
        with self._tool.range(f"step {number}"):
            yield
        if number == config.first_step + config.num_steps - 1:
            self._stop()

    def phase(self, name: str) -> AbstractContextManager[object]:
        """Around a phase of a step."""
        if self._tool is None or not self._running:
            return nullcontext()
        return self._tool.range(name)

    def write(self) -> list[Path]:
        """Write what was seen, once all of it was; returns the files."""
        if self._tool is None or self._running:
            return []
        tool, self._tool = self._tool, None
        name = f"steps_{self._first}-{self._last}_{self._stem.name}"
        return tool.write(self._stem.with_name(name))

    def _stop(self) -> None:
        if self._tool is not None and self._running:
            self._running = False
            self._tool.stop()

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()
        self.write()


def profiling_problems(
    config: ProfilingConfig | None, num_steps: int, world_size: int, *, elsewhere: bool = False
) -> list[str]:
    """What of `profiling` would look at nothing.

    Args:
        config: the section.
        num_steps: train.num_steps.
        world_size: ranks.
        elsewhere: the run is for another machine.
    """
    if config is None:
        return []
    problems: list[str] = []
    if config.first_step > num_steps:
        problems.append(
            f"profiling.first_step {config.first_step} is never reached: train.num_steps is "
            f"{num_steps}"
        )
    strangers = [rank for rank in config.ranks if rank >= world_size]
    if strangers or not config.ranks:
        problems.append(
            f"profiling.ranks {list(config.ranks)}: choose from 0 to {world_size - 1}, the ranks "
            "of this run"
        )
    if config.tool == "nvtx":
        if config.memory:
            problems.append("profiling.memory has no effect with profiling.tool nvtx; take torch")
        if not elsewhere and importlib.util.find_spec("nvtx") is None:
            problems.append(
                "profiling.tool nvtx: the package nvtx is not installed; "
                "pip install 'gdpo-megatron[nvtx]'"
            )
    return problems
