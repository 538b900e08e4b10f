"""What runs in a worker process: it finds its rewards, then answers jobs until its pipe ends.

Each reward of a job is answered by itself, as soon as it is done: what a worker has finished is not
lost when it is killed. Sync rewards run in the main thread, one at a time. Async ones run side by
side on an event loop; `running` tells the pool whose code is in the loop at the moment, so that of
many jobs the one that blocks it can be told from those that merely wait.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import struct
import time
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gdpo_megatron import sandbox
from gdpo_megatron.config.sandbox import SandboxConfig
from gdpo_megatron.config.schema import RewardConfig
from gdpo_megatron.processes import resident_bytes
from gdpo_megatron.rewards.base import Invalid, RewardSample
from gdpo_megatron.rewards.calls import CallTimeout, Outcome, call, call_async
from gdpo_megatron.rewards.plan import Lane, Plan
from gdpo_megatron.rewards.resolve import ResolvedReward, resolve_rewards
from gdpo_megatron.rewards.wire import decode_samples, encode_result, line

_HEALTH_SECONDS = 0.25


def timeout_verdict(seconds: float) -> Invalid:
    """What a row is whose reward took longer than it may."""
    return Invalid("sample timeout", f"no result within {seconds:g} s")


class RunningJob:
    """Id of the job whose code an event loop is in; shared by worker and pool."""

    NONE = -1

    def __init__(self):
        self._memory = mmap.mmap(-1, 8)  # anonymous and shared: a fork on either side sees it
        self.set(self.NONE)

    def get(self) -> int:
        """The id."""
        return struct.unpack_from("q", self._memory)[0]

    def set(self, job: int) -> None:
        """Note the id."""
        struct.pack_into("q", self._memory, 0, job)

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()


class Worker:
    """One worker.

    Args:
        plan: the suite's.
        lane: which rewards this worker runs.
        jobs_fd: pipe that jobs come from.
        results_fd: pipe that results go to.
        done_fd: eventfd that wakes the pool up, once a job: it need not see every single answer.
        running: where an async worker notes what it is in.
    """

    def __init__(
        self,
        plan: Plan,
        lane: Lane,
        *,
        jobs_fd: int,
        results_fd: int,
        done_fd: int,
        running: RunningJob,
    ):
        self._plan, self._lane = plan, lane
        self._jobs_fd, self._results_fd, self._done_fd = jobs_fd, results_fd, done_fd
        self._running = running
        self._rewards: dict[int, ResolvedReward] = {}
        self._health_checked = time.monotonic()

    def serve(self) -> None:
        """Answer jobs until the pool closes the pipe."""
        try:
            _configure_sandbox(self._plan.sandbox)
            self._rewards = self._resolve()
        except BaseException as error:
            self._send({"failed": f"{type(error).__name__}: {error}"}, wake=True)
            return
        self._send({"ready": True}, wake=True)
        if self._lane.is_async:
            asyncio.run(self._serve_async())
            return
        with os.fdopen(self._jobs_fd, "rb") as jobs:
            while header := jobs.readline():
                self._do(json.loads(header), decode_samples(jobs.readline()))

    def _resolve(self) -> dict[int, ResolvedReward]:
        columns = self._lane.columns
        configs = [RewardConfig(**self._plan.rewards[column]) for column in columns]
        resolved = resolve_rewards(configs, Path(self._plan.base_dir))
        return dict(zip(columns, resolved, strict=True))

    def _do(self, job: Mapping[str, Any], samples: Sequence[RewardSample]) -> None:
        columns: list[int] = job["columns"]
        for column in columns:
            outcome = call(self._rewards[column], samples)
            self._answer(job["job"], column, outcome, last=column == columns[-1])

    def _answer(self, job: int, column: int, outcome: Outcome, *, last: bool) -> None:
        message: dict[str, Any] = {
            "job": job,
            "column": column,
            "results": [encode_result(result) for result in outcome.results],
            "seconds": outcome.seconds,
        }
        if outcome.events:
            message["events"] = outcome.events
        if last and self._is_worn():
            message["worn"] = True
        self._send(message, wake=last)

    def _is_worn(self) -> bool:
        """Whether calls have left so much behind that a fresh worker should take over."""
        now = time.monotonic()
        if now - self._health_checked < _HEALTH_SECONDS:
            return False
        self._health_checked = now
        descriptors = sum(1 for _ in Path("/proc/self/fd").iterdir())
        return (
            resident_bytes("self") > 0.75 * self._plan.memory_bytes
            or descriptors > os.sysconf("SC_OPEN_MAX") // 2
        )

    def _send(self, message: Mapping[str, Any], *, wake: bool) -> None:
        left = memoryview(line(message))
        while left:
            left = left[os.write(self._results_fd, left) :]
        if wake:
            os.eventfd_write(self._done_fd, 1)

    # ---- async -----------------------------------------------------------------------------------

    async def _serve_async(self) -> None:
        reader = asyncio.StreamReader(limit=2**31)
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(self._jobs_fd, "rb")
        )
        tasks: set[asyncio.Task[None]] = set()
        while header := await reader.readline():
            task = loop.create_task(
                self._do_async(json.loads(header), decode_samples(await reader.readline()))
            )
            tasks.add(task)  # the loop itself keeps no reference
            task.add_done_callback(tasks.discard)

    async def _do_async(self, job: Mapping[str, Any], samples: Sequence[RewardSample]) -> None:
        (column,) = job["columns"]
        timed = self._timed(job["job"], self._plan.sample_timeout_seconds * len(samples))
        outcome = await call_async(self._rewards[column], samples, timed)
        self._answer(job["job"], column, outcome, last=True)

    def _timed(self, job: int, seconds: float) -> Callable[[Awaitable[Any]], Awaitable[Any]]:
        async def run(awaitable: Awaitable[Any]) -> Any:
            try:
                async with asyncio.timeout(seconds) as scope:
                    return await _Noted(awaitable, self._running, job)
            except TimeoutError as error:
                if scope.expired():
                    raise CallTimeout(timeout_verdict(seconds)) from error
                raise

        return run


class _Noted:
    """An awaitable that notes its job while its own code runs, not while it waits."""

    def __init__(self, awaitable: Awaitable[Any], running: RunningJob, job: int):
        self._awaitable, self._running, self._job = awaitable, running, job

    def __await__(self) -> Generator[Any, Any, Any]:
        inner: Any = self._awaitable.__await__()
        step, argument = inner.send, None
        while True:
            self._running.set(self._job)
            try:
                wanted = step(argument)
            except StopIteration as done:
                return done.value
            finally:
                self._running.set(RunningJob.NONE)
            try:
                step, argument = inner.send, (yield wanted)
            except GeneratorExit:
                inner.close()
                raise
            except BaseException as error:
                step, argument = inner.throw, error


def _configure_sandbox(values: Mapping[str, Any]) -> None:
    sandbox.configure(SandboxConfig(**values))
