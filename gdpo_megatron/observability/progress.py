"""What a person sees of a run while it runs.

On a terminal, a few lines that redraw themselves in place:

    quickstart gdpo
    step   12/40  ------------                         30%  0:21 elapsed, 0:49 left
    rollout       -----------------------         96/128  0.4 s
      format       0.830  ..::||||
      correctness  1.920  ..::::||

Anywhere else (a file, a pipe, CI) one plain line per step:

    step 12/40  format 0.830  correctness 1.920  1.8 s/step  0:49 left

The cursor is never hidden and no other screen is used, so that a run that is killed, even with
SIGKILL, leaves the terminal as it was.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

# Steps that the pace is taken from: enough to be steady, few enough to follow a change.
_PACE_STEPS = 20
_BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"


@dataclass
class ProgressState:
    """Where a run stands; what is drawn follows from this and the clock alone."""

    title: str
    total_steps: int
    unit: str
    """What a step is called, e.g. "step" or "file"."""

    step: int
    """Steps done, those of earlier attempts included."""

    started: float
    """When this process began, by the display's clock, as for the other times."""

    phase: str = ""
    phase_started: float = 0.0
    phase_progress: tuple[int, int] | None = None
    """(done, total) within the phase, where it tells."""

    step_ends: deque[float] = field(default_factory=lambda: deque[float](maxlen=_PACE_STEPS + 1))
    """`started`, then the end of each step of this process; the latest ones."""

    history: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    """Label -> its value at each step of this process."""

    outcome: Literal["running", "done", "interrupted", "failed"] = "running"

    def seconds_per_step(self) -> float | None:
        """The recent pace; None before this process has done a step."""
        num_steps = len(self.step_ends) - 1
        return (self.step_ends[-1] - self.step_ends[0]) / num_steps if num_steps > 0 else None

    def seconds_left(self, now: float) -> float | None:
        """Time until the last step at the recent pace, counted down within a step too."""
        pace = self.seconds_per_step()
        if pace is None:
            return None
        num_left = max(0, self.total_steps - self.step)
        return max(0.0, pace * num_left - (now - self.step_ends[-1]))


class ProgressDisplay:
    """Progress of a run: step, phase, the latest values of a step, time left.

    Use it as a context manager; outside of the block it shows nothing. The time left follows from
    the steps that this process has done, so it is unknown until the first one is.

    Args:
        total_steps: steps of the whole run.
        start_step: steps that earlier attempts have done.
        title: what runs.
        unit: what a step is called.
        enabled: False on all ranks but one: then nothing is ever shown.
        console: where to; default standard output.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        title: str = "",
        *,
        unit: str = "step",
        enabled: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        # Not rich's own guess: FORCE_COLOR, set in many CI systems, would make it draw into files.
        self._console = console or Console(force_terminal=sys.stdout.isatty())
        self._enabled = enabled
        self._clock = clock
        self._state = ProgressState(title, total_steps, unit, start_step, started=clock())
        self._active = False
        self._live: Live | None = None

    def set_total(self, total_steps: int) -> None:
        """Say how many steps there are, where that was not known at the beginning."""
        self._state.total_steps = total_steps

    def phase(self, name: str) -> None:
        """Say what the run does from now on, e.g. "rollout"."""
        state = self._state
        state.phase, state.phase_started, state.phase_progress = name, self._clock(), None

    def progress(self, done: int, total: int) -> None:
        """Say how far the current phase is, e.g. 96 of 128 completions."""
        self._state.phase_progress = (done, total)

    def step_done(self, step: int, summary: Mapping[str, float]) -> None:
        """Say that a step has ended.

        Args:
            step: steps done in all, this one included.
            summary: label -> value, in the order to show them.
        """
        self._state.step = step
        self._state.step_ends.append(self._clock())
        for label, value in summary.items():
            self._state.history.setdefault(label, []).append(float(value))
        if self._live is not None:
            self._live.refresh()
        else:
            self._print(plain_line(self._state, summary))

    def message(self, text: str) -> None:
        """Print lines that stay, above the display."""
        if self._live is not None:
            self._console.print(Text(text))
        else:
            self._print(text)

    def __enter__(self) -> ProgressDisplay:
        now = self._clock()
        self._state.started = self._state.phase_started = now
        self._state.step_ends.clear()
        self._state.step_ends.append(now)
        self._active = self._enabled
        if self._active and self._console.is_terminal and not self._console.is_dumb_terminal:
            frame = _Frame(self._state, self._clock)
            self._live = Live(frame, console=self._console, refresh_per_second=4)
            self._live.start()
            self._console.show_cursor(True)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._state.outcome = "done"
        if exc_type is not None:
            interrupted = issubclass(exc_type, KeyboardInterrupt)
            self._state.outcome = "interrupted" if interrupted else "failed"
        live, self._live, self._active = self._live, None, False
        if live is not None:
            live.stop()

    def _print(self, line: str) -> None:
        if self._active:
            print(line, file=self._console.file, flush=True)


def plain_line(state: ProgressState, summary: Mapping[str, float]) -> str:
    """What a step that has just ended says where nothing can be redrawn."""
    digits = len(str(state.total_steps))
    parts = [state.title] if state.title else []
    parts.append(f"{state.unit} {state.step:>{digits}}/{state.total_steps}")
    parts += [f"{label} {format_number(value)}" for label, value in summary.items()]
    pace, left = state.seconds_per_step(), state.seconds_left(state.step_ends[-1])
    if pace is not None and left is not None:
        parts += [f"{format_number(pace)} s/{state.unit}", f"{format_duration(left)} left"]
    return "  ".join(parts)


class _Frame:
    """Draws the display as it is at the moment; rich asks for it several times a second."""

    def __init__(self, state: ProgressState, clock: Callable[[], float]):
        self._state = state
        self._clock = clock

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._state.title:
            yield Text(self._state.title, style="bold", no_wrap=True, overflow="ellipsis")
        yield self._bars()
        if self._state.history:
            yield self._values(options)

    def _bars(self) -> Table:
        """The steps, and the phase below them; columns keep their width from phase to phase."""
        state, now = self._state, self._clock()
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(no_wrap=True, min_width=12)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True, justify="right", min_width=24)
        digits = len(str(state.total_steps))
        grid.add_row(
            Text.assemble(
                (f"{state.unit} ", "bold"), f"{state.step:>{digits}}/{state.total_steps}"
            ),
            _bar(state.step, state.total_steps, "green"),
            self._times(now),
        )
        if state.outcome == "running" and state.phase:
            seconds = (f"{now - state.phase_started:.1f} s", "dim")
            done, total = state.phase_progress or (0, 0)
            grid.add_row(
                Text(state.phase, style="cyan"),
                _bar(done, total, "cyan") if state.phase_progress else "",
                Text.assemble(f"{done}/{total}  " if state.phase_progress else "", seconds),
            )
        return grid

    def _times(self, now: float) -> Text:
        state = self._state
        elapsed = format_duration(now - state.started)
        if state.outcome != "running":
            where = f" in {state.phase}" if state.outcome == "failed" and state.phase else ""
            style = "green" if state.outcome == "done" else "bold red"
            return Text(f"{state.outcome}{where} after {elapsed}", style=style)
        left = state.seconds_left(now)
        if left is None:
            return Text(f"{elapsed} elapsed", style="dim")
        return Text.assemble((f"{elapsed} elapsed, ", "dim"), f"{format_duration(left)} left")

    def _values(self, options: ConsoleOptions) -> Table:
        """The latest value of each label, and how it came about."""
        history = self._state.history
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True, overflow="ellipsis")
        grid.add_column(no_wrap=True, justify="right")
        grid.add_column(no_wrap=True)
        width = min(40, options.max_width - 16 - max(map(len, history)))
        for label, values in history.items():
            curve = "" if options.ascii_only else sparkline(values, width)
            number = Text(format_number(values[-1]), style="bold")
            grid.add_row(Text(f"  {label}"), number, Text(curve, style="blue"))
        return grid


def _bar(done: int, total: int, style: str) -> ProgressBar:
    return ProgressBar(
        total=max(total, 1), completed=done, complete_style=style, finished_style=style
    )


def format_number(value: float) -> str:
    """Three or four significant digits, thousands set apart.

    >>> [format_number(it) for it in (0.83, -2.5, 41.27, 4213.4, 1e-6, 0)]
    ['0.830', '-2.500', '41.27', '4,213', '1.0e-06', '0.000']
    """
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.2f}"
    return f"{value:.3f}" if size >= 0.001 or value == 0 else f"{value:.1e}"


def format_duration(seconds: float) -> str:
    """Hours, minutes, seconds.

    >>> format_duration(49.6), format_duration(3671)
    ('0:50', '1:01:11')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of `values` in at most `width` blocks, from their lowest to their highest.

    More values than blocks are averaged in runs; what is not finite is a space; a course without
    any rise or fall runs at half height.
    """
    if width < 1 or not values:
        return ""
    num_blocks = min(width, len(values))
    edges = [round(index * len(values) / num_blocks) for index in range(num_blocks + 1)]
    runs = [values[start:end] for start, end in pairwise(edges)]
    means = [sum(run) / len(run) for run in runs]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    span = high - low

    def block(mean: float) -> str:
        if not math.isfinite(mean):
            return " "
        return _BLOCKS[round((mean - low) / span * 7) if span > 0 else 3]

    return "".join(map(block, means))
