"""Compares mathematical expressions in processes that can be killed.

sympy has no bound: a tower of powers or a large binomial computes for hours, inside C calls that
ignore signals. Each comparison is therefore done by a worker process and killed, from outside, when
its time is over. A pool of `multiprocessing` (pebble's included) does not fit: its workers import
the caller's main module again, here torch and Megatron, and a reward worker that is itself a
daemonic process could not have any. These workers load math-verify and nothing else.

One worker exists per call at a time: a thread takes an idle one or starts one. So a reward worker
process has one, and a slow comparison delays nobody else.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

MAX_EXPRESSION_CHARS = 4_000
MAX_MEMORY_BYTES = 3 * 1024**3
MAX_COMPARISONS = 1_000
"""A worker is replaced after so many: the caches of sympy grow."""

START_SECONDS = 60.0
"""Loading math-verify takes about a second; on a busy machine, more."""

_SCRIPT = Path(__file__).with_name("math_worker.py")

# What the interpreter needs to find its packages. The rest of the environment holds secrets, and
# is of no use to something that reads text written by a model.
_PASSED_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "LANG")
# The same arithmetic everywhere, whether gmpy2 happens to be installed or not.
_ARITHMETIC = {"SYMPY_GROUND_TYPES": "python", "MPMATH_NOGMPY": "1"}


class VerifierError(RuntimeError):
    """The comparison could not be made, for a reason that is not in the expressions.

    Args:
        reason: few words, to be counted.
        detail: what is known about this case.
    """

    def __init__(self, reason: str, detail: str = ""):
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}" if detail else reason)


Outcome = Literal["equal", "different", "timeout", "memory"]


class _TimedOut(Exception):
    pass


class _Died(Exception):
    pass


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    num_comparisons: int = 0
    unread: bytes = b""

    def ask(self, request: dict[str, str], seconds: float) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            # Below the 64 KiB of a pipe, so that it cannot block on a worker that does not read.
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise _Died from error
        self.num_comparisons += 1
        return self.read(seconds)

    def read(self, seconds: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        deadline = time.monotonic() + seconds
        pipe = self.process.stdout.fileno()
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        while b"\n" not in self.unread:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise _TimedOut
            data = os.read(pipe, 65_536)
            if not data:
                raise _Died
            self.unread += data
        line, self.unread = self.unread.split(b"\n", 1)
        return json.loads(line)

    def stop(self, died: bool = False) -> str:
        """Kill it; of one that `died`, returns how."""
        status = None
        if died:  # its pipe may close a moment before it ends
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self.process.wait(timeout=1.0)
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # a request that it never read
                    pipe.close()
        return "its pipe closed" if status is None else f"exit status {status}"


class MathVerifier:
    """Compares expressions within bounds of time and memory.

    Safe to use from several threads. Workers start with the first comparison and die with this
    process, however it ends.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        # A worker is told by the kernel when the thread that started it is gone, which may well
        # be a short-lived one of the caller; this thread lives as long as the process.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="math-verifier-starter")

    def compare(self, gold: str, answer: str, timeout: float) -> Outcome:
        """Say whether `answer` is `gold`, both LaTeX of at most MAX_EXPRESSION_CHARS.

        An overrun and a crash are tried once more, in a fresh worker: it could have been the load
        of the machine, or memory that earlier comparisons had left.

        Args:
            gold: the expected expression.
            answer: the one to compare; the order matters to math-verify.
            timeout: seconds for each of the two tries; the start of a worker is not counted.

        Raises:
            VerifierError: workers do not start, or died, or math-verify raised.
        """
        if max(len(gold), len(answer)) > MAX_EXPRESSION_CHARS:
            raise ValueError(f"an expression is longer than {MAX_EXPRESSION_CHARS} characters")
        request = {"gold": gold, "answer": answer}
        died = ""
        for fresh in (False, True):
            worker = self._take(fresh)
            try:
                reply = worker.ask(request, timeout)
            except _TimedOut:
                worker.stop()
                died = ""
                continue
            except _Died:
                died = worker.stop(died=True)
                continue
            except BaseException:
                worker.stop()
                raise
            if "equal" in reply:
                self._give_back(worker)
                return "equal" if reply["equal"] else "different"
            worker.stop()
            if reply.get("error") == "memory":
                return "memory"
            raise VerifierError(f"verifier {reply.get('error', 'sent no verdict')}")
        if died:
            raise VerifierError("verifier crashed", f"twice, {died}")
        return "timeout"

    def close(self) -> None:
        """Stop all idle workers; the next comparison starts new ones."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.stop()

    def _take(self, fresh: bool) -> _Worker:
        while not fresh:
            with self._lock:
                if not self._idle:
                    break
                worker = self._idle.pop()
            if worker.process.poll() is None:
                return worker
            worker.stop()
        return self._starter.submit(self._start).result()

    def _give_back(self, worker: _Worker) -> None:
        if worker.num_comparisons >= MAX_COMPARISONS:
            worker.stop()
            return
        with self._lock:
            self._idle.append(worker)

    def _start(self) -> _Worker:
        environment = {name: os.environ[name] for name in _PASSED_ENVIRONMENT if name in os.environ}
        command = [sys.executable, "-P", str(_SCRIPT), str(os.getpid()), str(MAX_MEMORY_BYTES)]
        try:
            # -P: without it the script's folder, which has a math.py, would come first in sys.path.
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment | _ARITHMETIC,
                cwd="/",
            )
        except OSError as error:
            raise VerifierError("verifier does not start", str(error)) from error
        worker = _Worker(process)
        try:
            reply = worker.read(START_SECONDS)
        except _TimedOut:
            worker.stop()
            raise VerifierError("verifier does not start", f"in {START_SECONDS:g} s") from None
        except _Died:
            raise VerifierError("verifier does not start", worker.stop(died=True)) from None
        if not reply.get("ready"):
            worker.stop()
            raise VerifierError("verifier does not start", str(reply.get("error")))
        return worker


_shared: MathVerifier | None = None
_shared_lock = threading.Lock()
_inherited: list[MathVerifier] = []


def shared_verifier() -> MathVerifier:
    """The one of this process."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = MathVerifier()
        return _shared


def _forget_shared() -> None:
    # Its workers and its thread belong to the parent of the fork; the lock may be held there. It is
    # kept, because dropping it would have this process look after children that are not its own.
    global _shared, _shared_lock
    if _shared is not None:
        _inherited.append(_shared)
    _shared, _shared_lock = None, threading.Lock()


def _close_shared() -> None:
    if _shared is not None:
        _shared.close()


os.register_at_fork(after_in_child=_forget_shared)
atexit.register(_close_shared)
