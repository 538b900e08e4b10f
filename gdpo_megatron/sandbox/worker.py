"""One fork server and its protocol, from the side of the trainer.

A run's files are made here and their other ends handed over: the program and stdin as memory files,
stdout, stderr and the value of a call as pipes. What comes out of the pipes is bounded here, time
is kept here, and what the exit means is decided here.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gdpo_megatron.sandbox import guest
from gdpo_megatron.sandbox.bpf import operand_offsets
from gdpo_megatron.sandbox.guest import confine, runner
from gdpo_megatron.sandbox.guest.zygote import HEADER, REPLY
from gdpo_megatron.sandbox.launch import Isolation, make_launch
from gdpo_megatron.sandbox.results import (
    NO_VALUE,
    Execution,
    Limits,
    SandboxUnavailable,
    Status,
)
from gdpo_megatron.sandbox.syscalls import OWN_PID, program_filter
from gdpo_megatron.sandbox.values import decode

_START_SECONDS = 60.0
_KILL_SECONDS = 10.0
_STDERR_BYTES = 4096
_MODULES = ("encode", "runner", "confine", "zygote")
_CREDENTIALS = struct.Struct("3i")

_EXIT_STATUS = {
    0: Status.OK,
    runner.COMPILE_ERROR: Status.COMPILE_ERROR,
    runner.MEMORY: Status.MEMORY,
    runner.DENIED: Status.DENIED,
}


class WorkerDied(RuntimeError):
    """The fork server is gone or does not answer; the run it had says nothing."""


class Worker:
    """A running fork server. One run at a time.

    Args:
        isolation: the mode.
        allow_numpy: import numpy beforehand.
        landlock: use it; False only where the kernel has none.

    Raises:
        SandboxUnavailable: it cannot be started; says what the mode's program said.
    """

    def __init__(self, isolation: Isolation, *, allow_numpy: bool, landlock: bool):
        self.isolation = isolation
        self.num_runs = 0
        launch = make_launch(isolation, allow_numpy=allow_numpy)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._stderr = tempfile.TemporaryFile()  # closed with the worker
        try:
            self._process = subprocess.Popen(
                launch.command,
                env=launch.environment,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                start_new_session=True,
                **launch.popen,
            )
        except OSError as error:
            self._control.close()
            raise SandboxUnavailable(f"{isolation}: cannot be started: {error}") from error
        finally:
            theirs.close()
            for descriptor in launch.layout.descriptors:
                os.close(descriptor)
        instructions = program_filter()
        settings = {
            "confined": isolation != "unsafe",
            "landlock": landlock,
            "parent": os.getpid() if launch.is_child else 0,
            "read_trees": launch.layout.read_trees,
            "read_listings": launch.layout.read_listings,
            "packages": launch.layout.packages,
            "keep": launch.layout.descriptors,
            "filter": instructions.hex(),
            "own_pid_offsets": operand_offsets(instructions, OWN_PID),
        }
        try:
            self._control.send(json.dumps(_boot_message(settings)).encode())
            self.pid = self._await_hello()
            self._base_bytes = _address_space(self.pid)
        except (OSError, WorkerDied) as error:
            reason = self._last_words() or str(error)
            self.kill()
            raise SandboxUnavailable(f"{isolation}: {reason}") from error

    def execute(self, request: Mapping[str, Any], stdin: bytes, limits: Limits) -> Execution:
        """Run one request.

        Args:
            request: what `guest.runner.run` takes.
            stdin: of the program.
            limits: of the run.

        Raises:
            WorkerDied: the server ended or does not answer. Kill it.
        """
        self.num_runs += 1
        run = _Run(limits, time.perf_counter())
        try:
            self._start(run, request, stdin)
            while run.reply is None:
                self._step(run)
            run.drain()
        except OSError as error:
            raise WorkerDied(f"{self.isolation}: {error}") from error
        finally:
            run.close()
        return _outcome(run, request, self.isolation)

    def kill(self) -> None:
        """End the server, and with it whatever it runs."""
        self._control.close()
        self._process.kill()
        self._process.wait()
        self._stderr.close()

    def _start(self, run: _Run, request: Mapping[str, Any], stdin: bytes) -> None:
        theirs: list[int] = []
        try:
            theirs += [_memory_file(json.dumps(request).encode()), _memory_file(stdin)]
            for name in ("stdout", "stderr", "value"):
                ours, other = os.pipe()
                os.set_blocking(ours, False)
                run.pipes[ours] = name
                theirs.append(other)
            header = HEADER.pack(run.limits.cpu_seconds, self._base_bytes + run.limits.memory_bytes)
            socket.send_fds(self._control, [header], theirs)
        finally:
            for descriptor in theirs:
                os.close(descriptor)

    def _step(self, run: _Run) -> None:
        """Wait for something to happen and deal with it."""
        left = run.deadline - time.perf_counter()
        if left <= 0:
            if run.kill_reason is not None:
                raise WorkerDied(f"{self.isolation}: a killed run does not end")
            self._kill_run(run, Status.TIMEOUT)
            return
        poller = select.poll()
        for descriptor in (self._control.fileno(), *run.pipes):
            poller.register(descriptor, select.POLLIN)
        for descriptor, _ in poller.poll(left * 1000):
            if descriptor == self._control.fileno():
                message = self._control.recv(REPLY.size)
                if not message:
                    raise WorkerDied(f"{self.isolation}: ended in a run; {self._last_words()}")
                run.reply = REPLY.unpack(message)
            elif not run.read(descriptor) and run.kill_reason is None:
                self._kill_run(run, Status.OUTPUT_LIMIT)

    def _kill_run(self, run: _Run, reason: Status) -> None:
        run.kill_reason, run.deadline = reason, time.perf_counter() + _KILL_SECONDS
        self._control.send(b"K")

    def _await_hello(self) -> int:
        self._control.settimeout(_START_SECONDS)
        try:
            message, ancillary, _, _ = self._control.recvmsg(4096, socket.CMSG_SPACE(12))
        except TimeoutError as error:
            raise WorkerDied(f"did not answer within {_START_SECONDS:.0f} s") from error
        finally:
            self._control.settimeout(None)
        if not message:
            raise WorkerDied("ended while it started")
        self.hello: dict[str, Any] = json.loads(message)
        # From the kernel, in this process's numbering: the server may have another pid namespace.
        return _CREDENTIALS.unpack(ancillary[0][2])[0]

    def _last_words(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else ""


@dataclass(slots=True)
class _Run:
    """State of one run."""

    limits: Limits
    began: float
    pipes: dict[int, str] = field(default_factory=dict[int, str])
    output: dict[str, bytearray] = field(default_factory=dict[str, bytearray])
    num_printed: int = 0
    kill_reason: Status | None = None
    reply: tuple[Any, ...] | None = None
    deadline: float = 0.0

    def __post_init__(self):
        self.deadline = self.began + self.limits.wall_seconds
        self.output = {name: bytearray() for name in ("stdout", "stderr", "value")}

    def read(self, descriptor: int) -> bool:
        """Take what is there; False when the run has said more than it may."""
        try:
            data = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return True
        name = self.pipes[descriptor]
        if not data:
            os.close(descriptor)
            del self.pipes[descriptor]
            return True
        kept, most = self.output[name], self.limits.output_bytes
        kept += data
        if name == "stderr":
            del kept[:-_STDERR_BYTES]
        if name == "value":
            fits = len(kept) <= most
        else:
            self.num_printed += len(data)
            fits = self.num_printed <= most
        del kept[most:]
        return fits

    def drain(self) -> None:
        """Read what was written before the end; bounded, for a pipe holds 64 KiB."""
        for descriptor in list(self.pipes):
            while descriptor in self.pipes:
                before = self.num_printed, len(self.output["value"])
                if not self.read(descriptor):
                    self.kill_reason = self.kill_reason or Status.OUTPUT_LIMIT
                    break
                if (self.num_printed, len(self.output["value"])) == before:
                    break

    def close(self) -> None:
        for descriptor in self.pipes:
            os.close(descriptor)
        self.pipes.clear()


def _outcome(run: _Run, request: Mapping[str, Any], isolation: str) -> Execution:
    assert run.reply is not None
    wait_status, cpu_seconds, wall_seconds, _, fault = run.reply
    exit_code = os.waitstatus_to_exitcode(wait_status)
    value: Any = NO_VALUE
    fault = fault.rstrip(b"\0").decode(errors="replace")
    if fault:
        status, detail = Status.INFRA_ERROR, f"{isolation}: {fault}"
    elif run.kill_reason is not None:
        status, detail = run.kill_reason, "wall clock" * (run.kill_reason is Status.TIMEOUT)
    elif exit_code < 0:
        status, detail = _killed(-exit_code, cpu_seconds >= run.limits.cpu_seconds)
    else:
        status, detail = _EXIT_STATUS.get(exit_code, Status.RUNTIME_ERROR), ""
        if "expression" in request:
            status, detail, value = _value(status, exit_code, bytes(run.output["value"]))
        elif "check" in request and status is Status.OK:
            value = bytes(run.output["value"]).decode(errors="replace")
    return Execution(
        status=status,
        stdout=run.output["stdout"].decode(errors="replace"),
        stderr=run.output["stderr"].decode(errors="replace"),
        value=value,
        exit_code=exit_code,
        cpu_seconds=cpu_seconds,
        wall_seconds=wall_seconds,
        detail=detail,
        isolation=isolation,
    )


def _killed(number: int, cpu_used_up: bool) -> tuple[Status, str]:
    if number == signal.SIGXCPU or (number == signal.SIGKILL and cpu_used_up):
        return Status.TIMEOUT, "CPU time"
    if number == signal.SIGKILL:  # not by us: the kernel ran out of memory
        return Status.MEMORY, "killed"
    return Status.RUNTIME_ERROR, f"killed by signal {number}"


def _value(status: Status, exit_code: int, text: bytes) -> tuple[Status, str, Any]:
    """Status, detail and value of a call."""
    if exit_code == runner.NO_LITERAL:
        return Status.OK, "the value has no literal form", NO_VALUE
    if status is not Status.OK:
        return status, "", NO_VALUE
    if not text:
        return Status.RUNTIME_ERROR, "ended before the call returned", NO_VALUE
    try:
        return status, "", decode(text.decode())
    except ValueError as error:
        return Status.RUNTIME_ERROR, f"unreadable value: {error}", NO_VALUE


def _memory_file(content: bytes) -> int:
    descriptor = os.memfd_create("run")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _address_space(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    except (OSError, ValueError) as error:
        raise WorkerDied(f"its address space cannot be read: {error}") from error
    return pages * os.sysconf("SC_PAGE_SIZE")


def _boot_message(settings: Mapping[str, Any]) -> dict[str, Any]:
    assert guest.__file__ is not None
    package, folder = guest.__name__, Path(guest.__file__).parent
    parents = [package.rsplit(".", level)[0] for level in (2, 1, 0)]
    modules = [(name, "") for name in parents]
    modules += [(f"{package}.{name}", (folder / f"{name}.py").read_text()) for name in _MODULES]
    return {"modules": modules, "settings": settings}


def landlock_abi() -> int:
    """Version of this kernel's Landlock; 0 where there is none."""
    return confine.landlock_abi()
