"""A pool of workers with one call: run a program, get what came of it.

Callers wait while all workers are busy. A worker that fails is killed and replaced, and its run is
repeated on the new one; only after several failures the caller hears of it, as `infra_error`, which
is no verdict on the program.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from gdpo_megatron.config.sandbox import SandboxConfig
from gdpo_megatron.sandbox import syscalls
from gdpo_megatron.sandbox.launch import Isolation
from gdpo_megatron.sandbox.probe import probe
from gdpo_megatron.sandbox.results import (
    NO_VALUE,
    Execution,
    Limits,
    SandboxUnavailable,
    Status,
)
from gdpo_megatron.sandbox.worker import Worker, WorkerDied, landlock_abi

_log = logging.getLogger(__name__)

_AUTO: tuple[Isolation, ...] = ("bwrap", "inner")  # the strongest first
_NUM_ATTEMPTS = 3
_QUEUE_SECONDS = 300.0
NUM_TRIES = 2
"""Runs of a program that the wall clock ends: it may be the machine that is slow."""
_LITTLE_CPU = 0.5  # of the limit: a run that used less may have been starved by the machine


class Sandbox:
    """Runs programs, from any thread. The first worker is started, and probed, here.

    Args:
        config: the `sandbox` section.
        num_workers: programs that may run at a time.

    Raises:
        SandboxUnavailable: this machine cannot have the configured isolation.
    """

    isolation: Isolation
    """The mode in use."""

    def __init__(self, config: SandboxConfig, *, num_workers: int = 1):
        self.config = config
        self.limits = Limits.of(config)
        # A worker dies with the thread that started it: the parent death signal is the thread's.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="sandbox-starter")
        self._lock = threading.Lock()
        self._workers: set[Worker] = set()
        self._closed = False
        self.num_respawns = 0
        try:
            self.isolation, first = self._choose()
        except BaseException:
            self._starter.shutdown(wait=False)
            raise
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        for worker in (*[None] * (num_workers - 1), first):
            self._idle.put(worker)
        if self.isolation == "unsafe":
            _shout()
        _log.info("%s", self.describe())

    def describe(self) -> str:
        """One line: mode and what it rests on."""
        abi, kernel = landlock_abi(), os.uname().release
        proven = "NOT ISOLATED" if self.isolation == "unsafe" else "probe passed"
        return (
            f"sandbox: {self.isolation}, {proven}; Linux {kernel} {os.uname().machine}, "
            f"Landlock {abi or 'absent'}"
        )

    def run(self, program: str, *, stdin: str = "", limits: Limits | None = None) -> Execution:
        """Run a program as `python main.py < stdin`.

        Args:
            program: its source.
            stdin: its input.
            limits: instead of the configured ones.
        """
        return self._execute({"sources": [["main.py", program]]}, stdin, limits)

    def run_call(
        self,
        program: str,
        expression: str,
        *,
        prelude: str = "",
        setup: str = "",
        limits: Limits | None = None,
    ) -> Execution:
        """Run a program, evaluate an expression in its module and bring its value out.

        The value is whatever the program likes it to be: compare it with something that the
        program cannot know.

        Args:
            program: its source.
            expression: evaluated after it, in its module.
            prelude: source that runs before the program, in the same module.
            setup: source that runs after the program, in the same module.
            limits: instead of the configured ones.

        Returns:
            `value` holds it; NO_VALUE where the run failed or gave something that is no literal.
        """
        request = {**_request(program, prelude, setup), "expression": expression}
        return self._execute(request, "", limits)

    def run_check(
        self,
        program: str,
        check: str,
        *,
        prelude: str = "",
        setup: str = "",
        limits: Limits | None = None,
    ) -> Execution:
        """Run a program, then code that raises where the program is wrong.

        The weaker way: the check runs beside the program, which could find and change it. That it
        came to its end is known by a nonce, which keeps out programs that exit or print, not one
        that looks through its own memory. Arguments as for `run_call`.

        Returns:
            `value` is True where the check came to its end.
        """
        nonce = secrets.token_hex(16)
        request = {**_request(program, prelude, setup), "check": check, "nonce": nonce}
        done = self._execute(request, "", limits)
        passed = done.status is Status.OK and done.value == nonce
        if done.status is Status.OK and not passed:
            done = replace(done, status=Status.RUNTIME_ERROR, detail="ended before the check")
        return replace(done, value=passed if done.status is Status.OK else NO_VALUE)

    def close(self) -> None:
        """End all workers; runs under way end as `infra_error`."""
        with self._lock:
            self._closed = True
            workers, self._workers = self._workers, set()
        for worker in workers:
            worker.kill()
        self._starter.shutdown(wait=False)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- runs ------------------------------------------------------------------------------------

    def _execute(self, request: Mapping[str, Any], stdin: str, limits: Limits | None) -> Execution:
        limits, content = limits or self.limits, stdin.encode(errors="surrogatepass")
        num_starved = 0
        done = Execution(status=Status.INFRA_ERROR, detail="not run", isolation=self.isolation)
        for attempt in range(1, _NUM_ATTEMPTS + 1):
            done = replace(self._try(request, content, limits), num_attempts=attempt)
            if done.status is Status.INFRA_ERROR:
                if self._closed:
                    break
                _log.warning("sandbox: attempt %d failed: %s", attempt, done.detail)
                continue
            starved = _is_starved(done, limits)
            num_starved += starved
            if not starved or num_starved == NUM_TRIES:
                break
        return done

    def _try(self, request: Mapping[str, Any], stdin: bytes, limits: Limits) -> Execution:
        try:
            worker = self._idle.get(timeout=_QUEUE_SECONDS)
        except queue.Empty:
            return self._failed(f"no worker became free in {_QUEUE_SECONDS:.0f} s")
        try:
            if worker is None or worker.num_runs >= self.config.max_tasks_per_worker:
                worker = self._replace(worker)
            done = worker.execute(request, stdin, limits)
            if done.status is Status.INFRA_ERROR:
                worker = self._discard(worker)
            return done
        except (WorkerDied, SandboxUnavailable) as error:
            worker = self._discard(worker)
            return self._failed(str(error))
        except BaseException:  # interrupted in the middle of the protocol
            worker = self._discard(worker)
            raise
        finally:
            self._idle.put(worker)

    def _failed(self, detail: str) -> Execution:
        return Execution(status=Status.INFRA_ERROR, detail=detail, isolation=self.isolation)

    # ---- workers ---------------------------------------------------------------------------------

    def _choose(self) -> tuple[Isolation, Worker]:
        """The first mode that this machine supports, by its probe."""
        mode = self.config.mode
        problems: list[str] = []
        candidates: tuple[Isolation, ...] = _AUTO if mode == "auto" else (mode,)
        for isolation in candidates:
            try:
                return isolation, self._start(isolation)
            except SandboxUnavailable as error:
                problems += error.problems
        raise SandboxUnavailable(
            [f"sandbox.mode {mode} cannot be had here: {problem}" for problem in problems]
        )

    def _start(self, isolation: Isolation) -> Worker:
        worker = self._starter.submit(start_worker, isolation, self.config, self.limits).result()
        with self._lock:
            if not self._closed:
                self._workers.add(worker)
                return worker
        worker.kill()
        raise WorkerDied("the sandbox is closed")

    def _replace(self, worker: Worker | None) -> Worker:
        if worker is not None:
            self._discard(worker)
        return self._start(self.isolation)

    def _discard(self, worker: Worker | None) -> None:
        if worker is None:
            return
        with self._lock:
            known = worker in self._workers
            self._workers.discard(worker)
            self.num_respawns += known
        if known:  # otherwise `close` has ended it
            worker.kill()


def start_worker(isolation: Isolation, config: SandboxConfig, limits: Limits) -> Worker:
    """Start a worker of one mode and probe it.

    Raises:
        SandboxUnavailable: what is missing, or which probe failed.
    """
    abi = landlock_abi()
    if isolation != "unsafe" and not syscalls.supported():
        kind = f"{os.uname().sysname} on {os.uname().machine}"
        raise SandboxUnavailable(
            f"{isolation}: this is {kind}; the sandbox knows Linux on x86_64 only"
        )
    if isolation == "inner" and not abi:
        raise SandboxUnavailable(
            "inner: the kernel has no Landlock (Linux 5.13 or newer with 'landlock' among "
            "CONFIG_LSM or the boot parameter lsm=; containers: a runtime that lets it through)"
        )
    worker = Worker(isolation, allow_numpy=config.allow_numpy, landlock=bool(abi))
    try:
        problems = probe(worker, limits, allow_numpy=config.allow_numpy)
    except WorkerDied as error:
        problems = [str(error)]
    if problems:
        worker.kill()
        raise SandboxUnavailable(problems)
    worker.num_runs = 0
    return worker


def _request(program: str, prelude: str, setup: str) -> dict[str, Any]:
    sources = [["prelude.py", prelude], ["main.py", program], ["setup.py", setup]]
    return {"sources": [source for source in sources if source[1]]}


def _is_starved(done: Execution, limits: Limits) -> bool:
    """Whether the wall clock ended a run that hardly got to run."""
    by_wall = done.status is Status.TIMEOUT and done.detail == "wall clock"
    return by_wall and done.cpu_seconds < _LITTLE_CPU * limits.cpu_seconds


def _shout() -> None:
    line = "!" * 78
    print(
        f"{line}\nsandbox.mode is unsafe: programs that the model wrote run WITHOUT isolation,\n"
        f"with the rights of this process's user (root: of nobody). They can read, change and\n"
        f"stop whatever that user can.\n{line}",
        file=sys.stderr,
        flush=True,
    )
