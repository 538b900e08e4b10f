"""The process that runs a suite's workers: `python -m gdpo_megatron.rewards.pool`.

It stands between the trainer and the workers so that neither a busy trainer delays a deadline nor
a fault of a reward reaches the trainer. One thread, one loop: jobs come in on standard input and
wait in their lane's queue; a worker gets the next one when it has room, so that one that is stuck
holds nothing but what it has. Results go out on standard output, in whatever order.

What ends a worker before it has answered:

    a call over its time       that entry is invalid, the rest of the job goes on elsewhere
    memory, a crash, an exit   the call is made once more on a fresh worker, for an earlier one may
                               be to blame; a second time, the entry is invalid
    another job of its loop    the same

It ends, with all workers, when standard input does: with the trainer, whatever ended that.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from selectors import DefaultSelector
from typing import Any

from gdpo_megatron.rewards.base import Invalid
from gdpo_megatron.rewards.output_log import OutputLog
from gdpo_megatron.rewards.pipes import Inbox, Lines, Outbox
from gdpo_megatron.rewards.plan import Plan
from gdpo_megatron.rewards.process import WorkerProcess, adopt_orphans, kill_orphans
from gdpo_megatron.rewards.wire import encode_result, line
from gdpo_megatron.rewards.worker import RunningJob, timeout_verdict

START_SECONDS = 120.0
"""For a worker to find its rewards; some import a lot."""

_TICK_SECONDS = 0.05
_ASYNC_GRACE_SECONDS = 2.0  # an event loop ends its overdue calls itself, if it is not blocked
_CLOSE_SECONDS = 2.0
_HELD_BYTES = 2**16


@dataclass(slots=True, eq=False)
class _Job:
    """What is left of a job.

    Args:
        number: its id.
        lane: number of its lane.
        columns: the rewards that have not answered, in order; the first one is being called.
        num_samples: that each of them gives a result for.
        samples: the line that holds them.
        attempts: calls of `columns[0]` that ended with their worker.
        since: when that call began.
    """

    number: int
    lane: int
    columns: list[int]
    num_samples: int
    samples: bytes
    attempts: int = 0
    since: float = 0.0


@dataclass(slots=True)
class _Lane:
    """Queue and workers of a lane.

    Args:
        waiting: jobs that any worker may take.
        again: jobs for a worker that has not done any yet.
        workers: those that run; each with its jobs by their id.
    """

    waiting: deque[_Job] = field(default_factory=lambda: deque[_Job]())
    again: deque[_Job] = field(default_factory=lambda: deque[_Job]())
    workers: dict[WorkerProcess, dict[int, _Job]] = field(
        default_factory=dict[WorkerProcess, dict[int, _Job]]
    )


class Pool:
    """See the module.

    Args:
        plan: what to run.
        selector: with standard input's Inbox, which feeds `receive`.
        replies: where results go.
        trainer: process that this one ends with; a fork of it may hold standard input open.
    """

    def __init__(self, plan: Plan, selector: DefaultSelector, replies: Outbox, trainer: int):
        self._plan, self._selector, self._replies = plan, selector, replies
        self._trainer = trainer
        self._lanes = [_Lane() for _ in plan.lanes]
        self._held = bytearray()
        self._header: dict[str, Any] | None = None
        self._num_open = 0
        self._collecting = False
        self._step_deadline = float("inf")
        self._counts = Counter[str]()
        self._verdicts: dict[WorkerProcess, tuple[set[int], Invalid]] = {}
        self._log = OutputLog(plan.log_path)
        self._failed = False
        self.ended = False

    # ---- the loop --------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until standard input ends."""
        for number, lane in enumerate(self._plan.lanes):
            for _ in range(lane.num_workers):
                self._start_worker(number)
        ticked = time.monotonic()
        while not self.ended:
            busy = self._num_open or any(
                not worker.ready for lane in self._lanes for worker in lane.workers
            )
            for key, _ in self._selector.select(_TICK_SECONDS if busy else 1.0):
                if self._selector.get_map().get(key.fd) is key:  # not closed by one before it
                    key.data()
            self.ended |= os.getppid() != self._trainer
            now = time.monotonic()
            if now - ticked >= _TICK_SECONDS:
                ticked = now
                self._look_at_clocks(now)

    def close(self) -> None:
        """End all workers: those that are idle may clean up, the others are killed."""
        self.ended = self._failed = True
        for lane in self._lanes:
            for worker, jobs in lane.workers.items():
                worker.kill() if jobs or not worker.ready else worker.finish()
        end = time.monotonic() + _CLOSE_SECONDS
        while any(lane.workers for lane in self._lanes):
            for key, _ in self._selector.select(_TICK_SECONDS):
                if self._selector.get_map().get(key.fd) is key:
                    key.data()
            if time.monotonic() > end:
                for lane in self._lanes:
                    for worker in lane.workers:
                        worker.kill()
        kill_orphans(iter(()))

    # ---- from the trainer ------------------------------------------------------------------------

    def receive(self, text: bytes) -> None:
        """A line of standard input."""
        if self._header is not None:
            header, self._header = self._header, None
            job = _Job(
                header["job"], header["lane"], header["columns"], header["num_samples"], text
            )
            self._num_open += 1
            self._lanes[job.lane].waiting.append(job)
            self._give_jobs(job.lane)
            return
        message = json.loads(text)
        if "job" in message:
            self._header = message
            return
        self._collecting = True
        self._step_deadline = time.monotonic() + message["collect"]
        self._reply_if_done()

    def _reply_if_done(self) -> None:
        if self._collecting and not self._num_open:
            self._collecting, self._step_deadline = False, float("inf")
            self._reply(line({"collected": dict(self._counts)}), now=True)
            self._counts.clear()

    def _reply(self, data: bytes, *, now: bool = False) -> None:
        """Send to the trainer, who needs nothing before all is there: many answers at a time."""
        self._held += data
        if now or len(self._held) > _HELD_BYTES:
            self._replies.send(bytes(self._held))
            self._held.clear()

    # ---- jobs ------------------------------------------------------------------------------------

    def _give_jobs(self, number: int) -> None:
        lane, room = self._lanes[number], self._plan.lanes[number].num_concurrent
        for worker, jobs in lane.workers.items():
            takes = worker.ready and not (worker.ended or worker.worn or worker in self._verdicts)
            while takes and len(jobs) < room:
                fresh = worker.num_done == 0 and not (room == 1 and jobs)
                if lane.again and (fresh or room > 1):
                    job = lane.again.popleft()
                elif lane.waiting:
                    job = lane.waiting.popleft()
                else:
                    break
                jobs[job.number] = job
                job.since = time.monotonic()
                header = line({"job": job.number, "columns": job.columns})
                worker.send(header + job.samples + b"\n")

    def _message(self, worker: WorkerProcess, text: bytes) -> None:
        """A line of a worker."""
        if not worker.trusted:
            return
        try:
            message = json.loads(text)
            if "ready" in message:
                worker.ready = True
            elif "failed" in message:
                self._fail(f"a reward worker cannot start: {message['failed']}")
            else:
                self._answered(worker, message, text)
        except (ValueError, KeyError, TypeError):
            worker.trusted = False  # a reward has written to the pipe: whose answers are these?
            self._end_worker(worker, set(), Invalid("wrote to the suite's pipe"))
            return
        self._give_jobs(worker.lane)

    def _answered(self, worker: WorkerProcess, message: Mapping[str, Any], text: bytes) -> None:
        jobs = self._lanes[worker.lane].workers[worker]
        job = jobs[message["job"]]
        if message["column"] != job.columns[0] or len(message["results"]) != job.num_samples:
            raise ValueError("not what was asked")
        self._reply(text + b"\n")
        self._next_column(job)
        if not job.columns:
            del jobs[job.number]
            worker.num_done += 1
            worker.worn |= "worn" in message
            if worker.worn and not jobs:
                worker.finish()
        self._reply_if_done()

    def _next_column(self, job: _Job) -> None:
        del job.columns[0]
        job.attempts, job.since = 0, time.monotonic()
        self._num_open -= not job.columns

    def _settle(self, job: _Job, verdict: Invalid) -> None:
        """Answer in the place of a call that never will."""
        results = [encode_result(verdict)] * job.num_samples
        self._reply(line({"job": job.number, "column": job.columns[0], "results": results}))
        self._next_column(job)

    # ---- workers ---------------------------------------------------------------------------------

    def _start_worker(self, number: int) -> None:
        worker = WorkerProcess(
            self._plan,
            number,
            self._selector,
            on_message=self._message,
            on_end=self._ended,
            on_output=self._log.write,
        )
        self._lanes[number].workers[worker] = {}

    def _end_worker(self, worker: WorkerProcess, culprits: set[int], verdict: Invalid) -> None:
        """Kill a worker; the calls of `culprits` get the verdict, other jobs go on elsewhere."""
        self._verdicts[worker] = (culprits, verdict)
        self._counts["restarts"] += 1
        worker.kill()

    def _ended(self, worker: WorkerProcess) -> None:
        how = worker.reap()  # takes what it had still answered
        lane = self._lanes[worker.lane]
        jobs = lane.workers.pop(worker)
        kill_orphans(w.pid for other in self._lanes for w in other.workers)
        culprits, verdict = self._verdicts.pop(worker, (set[int](), None))
        if self._failed:
            return
        if not worker.ready:
            self._fail(f"a reward worker {how} before it was ready; it wrote:\n{worker.last_words}")
            return
        if verdict is None:
            self._counts["recycled" if worker.worn and not jobs else "restarts"] += 1
        for job in reversed(jobs.values()):
            if job.number in culprits and verdict is not None:
                self._settle(job, verdict)
                if job.columns:
                    lane.waiting.appendleft(job)
            else:
                self._lost(lane, job, verdict, how, worker.last_words)
        self._start_worker(worker.lane)
        self._give_jobs(worker.lane)
        self._reply_if_done()

    def _lost(
        self, lane: _Lane, job: _Job, verdict: Invalid | None, how: str, last_words: str
    ) -> None:
        """A call that ended with its worker, by its own fault or by that of another."""
        job.attempts += 1
        if job.attempts == 1:
            self._counts["retries"] += 1
            lane.again.append(job)
            return
        self._settle(job, verdict or Invalid(f"worker {how}", last_words))
        if job.columns:
            lane.waiting.appendleft(job)

    def _fail(self, what: str) -> None:
        if not self._failed:
            self._failed = True
            self._reply(line({"failed": what}), now=True)

    # ---- clocks ----------------------------------------------------------------------------------

    def _look_at_clocks(self, now: float) -> None:
        if now > self._step_deadline:
            self._end_step()
        for number, lane in enumerate(self._lanes):
            for worker, jobs in list(lane.workers.items()):
                if worker in self._verdicts or self._failed:
                    continue
                if not worker.ready:
                    if now - worker.started > START_SECONDS:
                        words = f"not ready after {START_SECONDS:g} s; it wrote:\n"
                        self._fail(f"a reward worker is {words}{worker.last_words}")
                elif jobs:
                    worker.take_results()  # of a job that is not done; and its pipe may be full
                    if jobs and worker.trusted:
                        is_async = self._plan.lanes[number].is_async
                        self._look_at(worker, jobs, now, is_async=is_async)

    def _look_at(
        self, worker: WorkerProcess, jobs: Mapping[int, _Job], now: float, *, is_async: bool
    ) -> None:
        limit, grace = self._plan.sample_timeout_seconds, _ASYNC_GRACE_SECONDS if is_async else 0.0
        overdue = {
            job.number for job in jobs.values() if now - job.since > limit * job.num_samples + grace
        }
        if overdue:
            inside = worker.running.get() if is_async else RunningJob.NONE
            longest = max(limit * jobs[number].num_samples for number in overdue)
            verdict = timeout_verdict(longest)
            if inside in jobs:
                # The others wait for the loop that this one does not give back.
                overdue = {inside}
                verdict = Invalid("blocked the event loop", "an async reward must not block")
            self._end_worker(worker, overdue, verdict)
        elif worker.resident_bytes() > self._plan.memory_bytes:
            mib = self._plan.memory_bytes // 2**20
            verdict = Invalid("memory limit", f"its worker came to more than {mib} MiB")
            self._end_worker(worker, set(), verdict)

    def _end_step(self) -> None:
        """Give up all that is open: the step's time is over."""
        for lane in self._lanes:
            for worker in list(lane.workers):
                worker.take_results()  # they came in time, though nobody has read them yet
        verdict = Invalid("step timeout", "the time for all rewards of the step was over")
        for lane in self._lanes:
            open_jobs = [*lane.waiting, *lane.again]
            lane.waiting.clear()
            lane.again.clear()
            for worker, jobs in lane.workers.items():
                open_jobs += jobs.values()
                if jobs:
                    self._end_worker(worker, set(), verdict)
                    jobs.clear()
            for job in open_jobs:
                while job.columns:
                    self._settle(job, verdict)
        self._reply_if_done()


def main() -> None:
    """Serve the process that started this one."""
    trainer = os.getppid()
    # Standard output is the way back to the trainer: nothing may print there by accident.
    replies_fd = os.dup(1)
    os.dup2(2, 1)
    adopt_orphans()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    selector = DefaultSelector()
    pool: Pool | None = None

    def first_then(text: bytes) -> None:
        nonlocal pool
        if pool is not None:
            pool.receive(text)
            return
        plan = Plan.from_json(json.loads(text))
        sys.path[:] = plan.import_path
        pool = Pool(plan, selector, Outbox(selector, replies_fd), trainer)

    ended = False

    def end() -> None:
        nonlocal ended
        ended = True
        if pool is not None:
            pool.ended = True

    inbox = Inbox(selector, 0, Lines(first_then), end)
    while pool is None and not ended:
        selector.select()
        inbox.read()
    if pool is None:
        return
    try:
        pool.run()
    finally:
        pool.close()


if __name__ == "__main__":
    main()
