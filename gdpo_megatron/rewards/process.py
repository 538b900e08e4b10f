"""The pool's side of one worker process: started by fork, watched, and ended with all it started.

The pool is a clean process of one thread that has imported no reward, so a fork of it is as clean
as a new interpreter and there in milliseconds. A worker leads a session of its own: killing its
process group takes along what a reward started. What left the group is adopted by the pool (which
is a subreaper) and killed there. The kernel kills a worker whose pool is gone.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from selectors import EVENT_READ, BaseSelector

import psutil

from gdpo_megatron.processes import die_with_parent, resident_bytes
from gdpo_megatron.rewards.pipes import Inbox, Lines, Outbox
from gdpo_megatron.rewards.plan import Plan
from gdpo_megatron.rewards.worker import RunningJob, Worker

_PR_SET_CHILD_SUBREAPER = 36
_TAIL_BYTES = 2000


def adopt_orphans() -> None:
    """Become the parent of all that descends from this process and loses its own."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


class WorkerProcess:
    """A running worker.

    Args:
        plan: the suite's.
        lane: number of its lane.
        selector: the pool's.
        on_message: called with (this, line) for each line that the worker sends.
        on_end: called with this when the process has ended; `reap` is due then.
        on_output: called with what the worker's rewards print.

    `ready` says that it has found its rewards, `worn` that it asks to be replaced, `ended` that the
    process is gone; `trusted` is for the pool to take away.
    """

    def __init__(
        self,
        plan: Plan,
        lane: int,
        selector: BaseSelector,
        *,
        on_message: Callable[[WorkerProcess, bytes], None],
        on_end: Callable[[WorkerProcess], None],
        on_output: Callable[[bytes], None],
    ):
        self.lane = lane
        self.ready = self.worn = self.ended = False
        self.trusted = True
        self.num_done = 0
        self.running = RunningJob()
        self.started = time.monotonic()
        self._tail = b""
        self._on_output = on_output
        jobs_read, jobs_write = os.pipe()
        results_read, results_write = os.pipe()
        output_read, output_write = os.pipe()
        self._done = os.eventfd(0)
        pool = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                selector.close()  # of this copy: its number could become another file's
                _become_worker(pool, output_write, keep=(jobs_read, results_write, self._done))
                Worker(
                    plan,
                    plan.lanes[lane],
                    jobs_fd=jobs_read,
                    results_fd=results_write,
                    done_fd=self._done,
                    running=self.running,
                ).serve()
                atexit._run_exitfuncs()  # what rewards registered; _exit skips it
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)  # the pool's frames are below: they are not this process's to leave
        for fd in (jobs_read, results_write, output_write):
            os.close(fd)
        self._jobs = Outbox(selector, jobs_write)
        self._results = Inbox(None, results_read, Lines(lambda text: on_message(self, text)))
        selector.register(self._done, EVENT_READ, self._wake)
        self._output = Inbox(selector, output_read, self._keep_output)
        self._selector = selector
        self._pidfd = os.pidfd_open(self.pid)
        selector.register(self._pidfd, EVENT_READ, lambda: on_end(self))

    def send(self, data: bytes) -> None:
        """Give it a job."""
        self._jobs.send(data)

    def take_results(self) -> None:
        """Take what it has answered; each answer is one call of `on_message`."""
        self._results.take()

    def finish(self) -> None:
        """Let it end when it has done what it has."""
        self._jobs.close()

    def kill(self) -> None:
        """End it and its process group at once; `on_end` follows."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # none yet, when it was only just forked

    def reap(self) -> str:
        """Read what is left, close everything, end its group; returns how it ended."""
        self.ended = True
        for fd in (self._pidfd, self._done):
            self._selector.unregister(fd)
            os.close(fd)
        self._results.drain()
        self._output.drain()
        self._jobs.close()
        # Its number cannot be another's before the wait below.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self.running.close()
        code = os.waitstatus_to_exitcode(status)
        return f"exited with {code}" if code >= 0 else f"died of {signal.Signals(-code).name}"

    def resident_bytes(self) -> int:
        """Memory that it holds."""
        return resident_bytes(self.pid)

    @property
    def last_words(self) -> str:
        """The end of what it printed."""
        return self._tail.decode(errors="replace").strip()

    def _wake(self) -> None:
        os.eventfd_read(self._done)
        self.take_results()

    def _keep_output(self, data: bytes) -> None:
        self._tail = (self._tail + data)[-_TAIL_BYTES:]
        self._on_output(data)


def _become_worker(pool: int, output: int, keep: tuple[int, ...]) -> None:
    os.setsid()
    die_with_parent(signal.SIGKILL)
    if os.getppid() != pool:
        os._exit(0)  # it ended before this could be asked for
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    with contextlib.suppress(OSError):
        # Short of memory, the kernel shall take a worker and not the trainer.
        Path("/proc/self/oom_score_adj").write_text("1000")
    nothing = os.open(os.devnull, os.O_RDONLY)
    for fd, number in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(fd, number)
    for entry in list(Path("/proc/self/fd").iterdir()):
        if int(entry.name) > 2 and int(entry.name) not in keep:
            with contextlib.suppress(OSError):  # the listing's own is among them
                os.close(int(entry.name))
    # New streams: the old ones believe to be at a file, where the trainer's output is one.
    sys.stdout, sys.stderr = (
        open(fd, "w", buffering=1, errors="replace", closefd=False) for fd in (1, 2)
    )
    faulthandler.enable()


def kill_orphans(known: Iterator[int]) -> None:
    """Kill and reap children of this process that are none of `known`, and theirs."""
    workers = set(known)
    for child in psutil.Process().children():
        if child.pid in workers:
            continue
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*child.children(recursive=True), child]:
                process.kill()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child.pid, 0)
