"""The progress display, drawn into a string with a clock that the test turns by hand.

Not covered: how a real terminal shows it, and rich's refresh thread.
"""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from gdpo_megatron.observability.progress import (
    ProgressDisplay,
    format_duration,
    format_number,
    sparkline,
)


class Clock:
    def __init__(self):
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


class Terminal:
    """What a terminal of 80 columns was sent, and the lines of the last frame of it."""

    def __init__(self, encoding: str = "utf-8"):
        self.bytes = io.BytesIO()
        self.file = io.TextIOWrapper(self.bytes, encoding=encoding, write_through=True)
        self.console = Console(
            file=self.file, force_terminal=True, width=80, height=30, _environ={"TERM": "xterm"}
        )

    @property
    def sent(self) -> str:
        return self.bytes.getvalue().decode(self.file.encoding)

    def last_frame(self) -> list[str]:
        frame = re.split(r"\x1b\[2K", self.sent)[-1]
        return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", frame).split("\n")]


def plain(**options: object) -> tuple[io.StringIO, Console]:
    file = io.StringIO()
    return file, Console(file=file, width=20, **options)  # pyright: ignore[reportArgumentType]


def test_elsewhere_than_on_a_terminal_each_step_is_one_plain_line():
    clock = Clock()
    file, console = plain()
    with ProgressDisplay(40, 10, "gdpo", console=console, clock=clock) as display:
        display.message("resuming at step 10")
        display.phase("rollout")
        display.progress(3, 4)
        clock.now += 3.0
        display.step_done(11, {"format": 0.5, "tokens/s": 4213.4})
        assert file.getvalue().count("\n") == 2
        clock.now += 1.0
        display.step_done(12, {"format": 0.75, "tokens/s": 4000.0})
    # 2 s a step over 2 steps; 28 left.
    assert file.getvalue() == (
        "resuming at step 10\n"
        "gdpo  step 11/40  format 0.500  tokens/s 4,213  3.000 s/step  1:27 left\n"
        "gdpo  step 12/40  format 0.750  tokens/s 4,000  2.000 s/step  0:56 left\n"
    )


def test_forced_colours_do_not_draw_into_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("FORCE_COLOR", "1")
    clock = Clock()
    with ProgressDisplay(2, clock=clock) as display:
        clock.now += 1.0
        display.step_done(1, {"format": 1.0})
    assert capsys.readouterr().out == "step 1/2  format 1.000  1.000 s/step  0:01 left\n"


def test_a_disabled_display_says_nothing():
    for file, console in (plain(), plain(force_terminal=True)):
        with ProgressDisplay(2, enabled=False, console=console) as display:
            display.phase("rollout")
            display.message("hello")
            display.step_done(1, {"format": 1.0})
        assert file.getvalue() == ""


def test_a_frame_on_a_terminal():
    clock, terminal = Clock(), Terminal()
    display = ProgressDisplay(40, 9, "gdpo run", console=terminal.console, clock=clock)
    with display:
        for step, value in ((10, 0.25), (11, 0.5), (12, 1.0)):
            clock.now += 2.0
            display.step_done(step, {"format": value, "tokens/s": 4000.0})
        clock.now += 0.5
        display.phase("rollout")
        display.progress(96, 128)
        clock.now += 1.0
        assert display._live is not None
        display._live.refresh()
        title, steps, phase, *values = terminal.last_frame()
    assert title == "gdpo run"
    assert re.fullmatch(
        r"step 12/40 +\u2501+\u2578?[\u2578\u257a\u2501]+ +0:08 elapsed, 0:54 left", steps
    )
    assert re.fullmatch(r"rollout +[\u2501\u2578\u257a]+ +96/128  1.0 s", phase)
    # 0.25, 0.5, 1 is a third of the way up, then all of it: blocks 0, round(7/3) = 2, 7.
    assert values == [
        "  format    1.000  \u2581\u2583\u2588",
        "  tokens/s  4,000  \u2584\u2584\u2584",
    ]


def test_before_the_first_step_no_time_is_promised():
    clock, terminal = Clock(), Terminal()
    with ProgressDisplay(40, 20, console=terminal.console, clock=clock) as display:
        clock.now += 5.0
        assert display._live is not None
        display._live.refresh()
        (steps,) = terminal.last_frame()
    assert re.fullmatch("step 20/40 +[\u2501\u2578\u257a]+ +0:05 elapsed", steps)


@pytest.mark.parametrize(
    ("error", "ending"),
    [
        (None, "done after 0:07"),
        (KeyboardInterrupt, "interrupted after 0:07"),
        (RuntimeError, "failed in update after 0:07"),
    ],
)
def test_the_terminal_is_left_in_order(error: type[BaseException] | None, ending: str):
    clock, terminal = Clock(), Terminal()
    display = ProgressDisplay(2, console=terminal.console, clock=clock)

    def run() -> None:
        with display:
            display.phase("update")
            clock.now += 7.0
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(error):
            run()
    frame = terminal.last_frame()
    assert frame[0].endswith(ending)
    assert "update" not in "".join(frame[1:])
    sent = terminal.sent
    assert sent.rfind("\x1b[?25h") > sent.rfind("\x1b[?25l")
    assert "\x1b[?1049h" not in sent
    assert sent.endswith("\n") or sent.endswith("\x1b[?25h")
    terminal.console.print("after")
    assert "after" in terminal.sent


def test_the_cursor_is_visible_while_it_runs():
    terminal = Terminal()
    with ProgressDisplay(2, console=terminal.console):
        assert terminal.sent.rfind("\x1b[?25h") > terminal.sent.rfind("\x1b[?25l")


def test_messages_stay_above_and_markup_is_text():
    terminal = Terminal()
    with ProgressDisplay(2, console=terminal.console) as display:
        display.message("a [bold]message[/bold] of [x]")
    assert "a [bold]message[/bold] of [x]" in terminal.sent


def test_a_terminal_that_knows_ascii_only():
    terminal = Terminal(encoding="ascii")
    with ProgressDisplay(2, console=terminal.console) as display:
        display.step_done(1, {"format": 0.5})
        display.step_done(2, {"format": 1.0})
    assert terminal.last_frame()[1] == "  format  1.000"


def test_the_time_left_follows_the_recent_steps():
    clock = Clock()
    file, console = plain()
    with ProgressDisplay(200, console=console, clock=clock) as display:
        for step in range(1, 101):
            clock.now += 10.0 if step <= 80 else 1.0
            display.step_done(step, {})
    lines = file.getvalue().splitlines()
    assert lines[0].endswith("10.00 s/step  33:10 left")
    # The last 20 steps took 1 s each.
    assert lines[-1] == "step 100/200  1.000 s/step  1:40 left"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.8304, "0.830"),
        (-2.5, "-2.500"),
        (41.267, "41.27"),
        (4213.4, "4,213"),
        (1e-6, "1.0e-06"),
        (0.0, "0.000"),
        (float("nan"), "nan"),
    ],
)
def test_numbers(value: float, text: str):
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (49.6, "0:50"), (59.7, "1:00"), (3671, "1:01:11")]
)
def test_durations(seconds: float, text: str):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("values", "width", "text"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"),
        ([0, 0, 1, 1, 2, 2], 3, "\u2581\u2585\u2588"),
        ([5, 5], 8, "\u2584\u2584"),
        ([0, float("nan"), 1], 8, "\u2581 \u2588"),
        ([float("inf")], 8, " "),
        ([], 8, ""),
        ([1, 2], 0, ""),
    ],
)
def test_sparklines(values: list[float], width: int, text: str):
    assert sparkline(values, width) == text
