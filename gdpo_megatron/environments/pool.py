"""Runs environments beside generation, in processes that can be killed.

    step(episode, task, turns)  --> the worker of that episode --> answers()

Each worker is a process with a thread here that minds it: it hands over one call at a time, and
ends a process that takes too long, holds too much or has died. The call that it was about gets a
`Fault`, after a second try where the process died; the worker's other episodes lose nothing, since
a fresh process makes their environments anew from the turns that come with every call.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from types import TracebackType
from typing import IO, Any

from gdpo_megatron.config.environment import EnvironmentConfig
from gdpo_megatron.config.sandbox import SandboxConfig
from gdpo_megatron.environments.base import EnvironmentStep, Task
from gdpo_megatron.processes import resident_bytes
from gdpo_megatron.rewards.output_log import OutputLog
from gdpo_megatron.rewards.wire import encode_metadata

START_SECONDS = 120.0
"""For a worker to find its environment; some import a lot."""

_TICK_SECONDS = 0.1
_TAIL_BYTES = 2000


@dataclass(frozen=True, slots=True)
class Fault:
    """A call that has no answer, by a fault that is not the model's.

    Args:
        reason: few words from a small set.
        detail: what is particular to this call.
        traceback: of the exception, where there was one.
    """

    reason: str
    detail: str = ""
    traceback: str = ""

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of a call.

    Args:
        episode: that it was about.
        outcome: the step, or why there is none.
        seconds: wall clock of the call.
    """

    episode: int
    outcome: EnvironmentStep | Fault
    seconds: float


class EnvironmentPool:
    """The environments of one engine.

    Args:
        config: the `rollout.environment` section, validated.
        base_dir: folder that `./file.py:factory` starts from.
        sandbox: for environments that run programs of the model.
        log_path: file for what environments print; not given, that is dropped.

    Processes start with `start` or the first `step`.
    """

    def __init__(
        self,
        config: EnvironmentConfig,
        *,
        base_dir: Path,
        sandbox: SandboxConfig | None = None,
        log_path: Path | None = None,
    ):
        self._config = config
        plan = {
            "type": config.type,
            "args": dict(config.args),
            "base_dir": str(base_dir.resolve()),
            "sandbox": asdict(sandbox or SandboxConfig()),
            "import_path": sys.path,
        }
        self._plan = json.dumps({"plan": plan}).encode() + b"\n"
        self._log = OutputLog(str(log_path) if log_path is not None else None)
        self._log_lock = threading.Lock()
        self._answers: queue.SimpleQueue[Answer | RuntimeError] = queue.SimpleQueue()
        self._workers: list[_Worker] = []
        self._num_open = 0
        self._closed = False

    @property
    def num_open(self) -> int:
        """Calls that `answers` has not returned yet."""
        return self._num_open

    def start(self) -> None:
        """Start the processes, if they are not there yet; returns at once."""
        if self._closed:
            raise RuntimeError("the environment pool is closed")
        if not self._workers:
            self._workers = [
                _Worker(self._config, self._plan, self._answers.put, self._write_log)
                for _ in range(self._config.num_workers)
            ]

    def step(self, episode: int, task: Task, turns: Sequence[str]) -> None:
        """Ask for the answer to the last of `turns`; returns at once.

        Args:
            episode: a number that no other episode of this pool has, ever.
            task: what it is about.
            turns: all of its turns so far.
        """
        self.start()
        text = (
            f'{{"episode":{episode},"task":{{"prompt":{json.dumps(task.prompt)},'
            f'"answer":{json.dumps(task.answer)},"metadata":{encode_metadata(task.metadata)}}},'
            f'"turns":{json.dumps(list(turns))}}}\n'
        )
        self._num_open += 1
        self._worker_of(episode).calls.put(_Call(episode, text.encode()))

    def answers(self, *, wait: bool) -> list[Answer]:
        """Take the answers that have come.

        Args:
            wait: for at least one, where calls are open.

        Raises:
            RuntimeError: a worker could not find its environment.
        """
        answers: list[Answer] = []
        while self._num_open:
            try:
                answer = self._answers.get(block=wait and not answers)
            except queue.Empty:
                break
            if isinstance(answer, RuntimeError):
                raise answer
            self._num_open -= 1
            answers.append(answer)
        return answers

    def forget(self, episodes: Iterable[int]) -> None:
        """Let go of episodes that have ended."""
        for episode in episodes:
            self._worker_of(episode).calls.put(_Forget(episode))

    def take_counts(self) -> Counter[str]:
        """Processes that were started anew, since the last call of this: by what ended them."""
        total = Counter[str]()
        for worker in self._workers:
            counts, worker.counts = worker.counts, Counter[str]()
            total += counts
        return total

    def close(self) -> None:
        """End the processes, and drop what is waiting."""
        self._closed = True
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.join()
        self._workers = []

    def __enter__(self) -> EnvironmentPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _worker_of(self, episode: int) -> _Worker:
        return self._workers[episode % len(self._workers)]

    def _write_log(self, data: bytes) -> None:
        with self._log_lock:
            self._log.write(data)


@dataclass(frozen=True, slots=True)
class _Call:
    episode: int
    text: bytes


@dataclass(frozen=True, slots=True)
class _Forget:
    episode: int


class _Stopped(Exception):
    """The pool is being closed."""


class _Ended(Exception):
    """The process is gone: what was the matter, and whether the call is to blame."""

    def __init__(self, fault: Fault, *, blames_call: bool):
        self.fault, self.blames_call = fault, blames_call


class _Worker(threading.Thread):
    """One process and the thread that minds it; the process ends with the thread."""

    def __init__(self, config: EnvironmentConfig, plan: bytes, on_answer: Any, on_output: Any):
        super().__init__(name="environment worker", daemon=True)
        self.calls: queue.SimpleQueue[_Call | _Forget | None] = queue.SimpleQueue()
        self.counts = Counter[str]()
        self._seconds = config.step_timeout_seconds
        self._memory_bytes = config.worker_memory_mb * 2**20
        self._plan, self._on_answer, self._on_output = plan, on_answer, on_output
        self._stopping = threading.Event()
        self._process: _Process | None = None
        self.start()

    def stop(self) -> None:
        """Let it end, whatever it is at."""
        self._stopping.set()
        self.calls.put(None)

    def run(self) -> None:
        try:
            self._ready()
            while (call := self.calls.get()) is not None:
                if isinstance(call, _Forget):
                    self._forget(call.episode)
                else:
                    began = time.perf_counter()
                    outcome = self._answer(call)
                    seconds = time.perf_counter() - began
                    answer = Answer(episode=call.episode, outcome=outcome, seconds=seconds)
                    self._on_answer(answer)
        except _Stopped:
            pass
        except Exception as error:
            self._on_answer(RuntimeError(f"an environment worker cannot start: {error}"))
        finally:
            if self._process is not None:
                self._process.end()

    def _answer(self, call: _Call) -> EnvironmentStep | Fault:
        for attempt in (1, 2):
            process = self._ready()
            try:
                return _outcome(self._exchange(process, call.text, self._seconds))
            except _Ended as ended:
                process.end()
                self._process = None
                self.counts[ended.fault.reason] += 1
                if ended.blames_call or attempt == 2:
                    return ended.fault
        raise AssertionError("unreachable")

    def _forget(self, episode: int) -> None:
        if self._process is not None:
            with suppress(OSError):  # a process that has died has forgotten
                self._process.send(json.dumps({"forget": [episode]}).encode() + b"\n")

    def _ready(self) -> _Process:
        """The process, started if there is none."""
        if self._process is None:
            self._process = _Process(self._on_output)
            try:
                message = self._exchange(self._process, self._plan, START_SECONDS)
            except _Ended as ended:
                words = self._process.last_words
                raise RuntimeError(f"{ended.fault}; it wrote:\n{words}") from None
            if "failed" in message:
                raise RuntimeError(message["failed"])
        return self._process

    def _exchange(self, process: _Process, text: bytes, seconds: float) -> dict[str, Any]:
        """Send a line and wait for one, minding time and memory."""
        deadline = time.monotonic() + seconds
        try:
            process.send(text)
        except OSError:
            raise _Ended(Fault("environment process died"), blames_call=False) from None
        while True:
            line = process.read_line(_TICK_SECONDS)
            if self._stopping.is_set():
                raise _Stopped
            if line is not None:
                try:
                    return json.loads(line)
                except ValueError:
                    raise _Ended(Fault("environment process died"), blames_call=False) from None
            if time.monotonic() > deadline:
                detail = f"no answer within {seconds:g} s"
                raise _Ended(Fault("environment timeout", detail), blames_call=True)
            if process.resident_bytes() > self._memory_bytes:
                detail = f"its process came to more than {self._memory_bytes // 2**20} MiB"
                raise _Ended(Fault("environment memory limit", detail), blames_call=True)


class _Process:
    """A worker process and its pipes."""

    def __init__(self, on_output: Any):
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "gdpo_megatron.environments.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C is the launcher's to handle
            bufsize=0,
        )
        assert self._popen.stdin and self._popen.stdout and self._popen.stderr
        self._stdin: IO[bytes] = self._popen.stdin
        self._held, self._tail, self._on_output = b"", b"", on_output
        self._selector = DefaultSelector()
        for stream, take in (
            (self._popen.stdout, self._take_reply),
            (self._popen.stderr, self._take_output),
        ):
            self._selector.register(stream, EVENT_READ, take)

    def send(self, data: bytes) -> None:
        """Write all of it."""
        left = memoryview(data)
        while left:
            left = left[os.write(self._stdin.fileno(), left) :]

    def read_line(self, seconds: float) -> bytes | None:
        """A line, if one comes within `seconds`; b"" when the process has closed its end."""
        end = time.monotonic() + seconds
        while b"\n" not in self._held:
            events = self._selector.select(max(0.0, end - time.monotonic()))
            for key, _ in events:
                data = os.read(key.fd, 65536)
                if not data:
                    self._selector.unregister(key.fileobj)
                    if key.data == self._take_reply:
                        return b""
                key.data(data)
            if not events and time.monotonic() >= end:
                return None
        line, _, self._held = self._held.partition(b"\n")
        return line

    def _take_reply(self, data: bytes) -> None:
        self._held += data

    def _take_output(self, data: bytes) -> None:
        self._tail = (self._tail + data)[-_TAIL_BYTES:]
        self._on_output(data)

    @property
    def last_words(self) -> str:
        """The end of what it printed."""
        return self._tail.decode(errors="replace").strip()

    def resident_bytes(self) -> int:
        """Memory that it holds."""
        return resident_bytes(self._popen.pid)

    def end(self) -> None:
        """Kill it and what it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.kill()
        self._popen.wait()
        self._selector.close()
        for stream in (self._stdin, self._popen.stdout, self._popen.stderr):
            assert stream is not None
            with suppress(OSError):
                stream.close()


def _outcome(message: Mapping[str, Any]) -> EnvironmentStep | Fault:
    if "raised" in message:
        return Fault("environment raised", message["raised"], message["traceback"])
    return EnvironmentStep(**message)
