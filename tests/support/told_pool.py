"""The pool of a suite, with time as its workers tell it: see told_time.py."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from gdpo_megatron.rewards import pool, process, worker
from support import told_time

_NOTES = Path(os.environ[told_time.FOLDER])
_timeout = asyncio.timeout


def _noted_timeout(delay: float | None) -> asyncio.Timeout:
    scope = _timeout(delay)
    told_time.scope.set(scope)
    return scope


class _ToldWorker(worker.Worker):
    def _timed(self, job: int, seconds: float) -> Callable[[Awaitable[Any]], Awaitable[Any]]:
        run = super()._timed(job, seconds)

        async def noted(awaitable: Awaitable[Any]) -> Any:
            told_time.job.set(job)
            return await run(awaitable)

        return noted


class _ToldPool(pool.Pool):
    def _look_at(
        self,
        worker: process.WorkerProcess,
        jobs: Mapping[int, pool._Job],
        now: float,
        *,
        is_async: bool,
    ) -> None:
        notes: list[Path] = []
        for job in jobs.values():
            note = _NOTES / f"{worker.pid}.{job.number if is_async else -1}"
            with contextlib.suppress(FileNotFoundError):
                job.since -= json.loads(note.read_text())
                notes.append(note)
        super()._look_at(worker, jobs, now, is_async=is_async)
        for note in notes:
            note.unlink()

    def _look_at_clocks(self, now: float) -> None:
        # The time of a step is over when all that is still at work says that it is stuck.
        busy = [
            it for lane in self._lanes for it, jobs in lane.workers.items() if jobs or not it.ready
        ]
        stuck = [(_NOTES / f"{it.pid}.stuck").exists() for it in busy]
        if self._collecting and stuck and all(stuck):
            self._step_deadline = 0.0
        super()._look_at_clocks(now)


asyncio.timeout = _noted_timeout
process.Worker = _ToldWorker
pool.Pool = _ToldPool
