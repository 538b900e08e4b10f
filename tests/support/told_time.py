"""Time that passes for a call because the call says so, not because the machine is slow.

A test sets limits that nothing reaches, and a reward says how long it has taken: its pool
(told_pool.py) then sees a call that began so much earlier. In a suite with the pool of the package
all of this does nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from contextvars import ContextVar
from pathlib import Path

FOLDER = "GDPO_TEST_TOLD_TIME"
FOREVER = 1e9

job: ContextVar[int] = ContextVar("job")
"""Id of an async call's job."""
scope: ContextVar[asyncio.Timeout] = ContextVar("scope")
"""What ends an async call when its time is over."""


def say(seconds: float) -> Path | None:
    """Tell the pool that so much time has passed for this call; returns what it takes away."""
    return _note(f"{os.getpid()}.{job.get(-1)}", seconds)


def pass_time(seconds: float) -> None:
    """The same for a sync call; returns when the pool has seen it and let the call go on."""
    note = say(seconds)
    while note is not None and note.exists():
        time.sleep(0.01)


async def be_overdue() -> None:
    """Have the event loop end this async call, as it does when its time is over."""
    if FOLDER in os.environ and not scope.get().expired():
        scope.get().reschedule(asyncio.get_running_loop().time())
        await asyncio.sleep(0)


def be_stuck() -> None:
    """Tell the pool that nothing more will come of this process."""
    _note(f"{os.getpid()}.stuck", 0.0)


def _note(name: str, seconds: float) -> Path | None:
    if FOLDER not in os.environ:
        return None
    note = Path(os.environ[FOLDER], name)
    part = note.with_name(f"{name}.part")
    part.write_text(json.dumps(seconds))
    part.rename(note)
    return note
