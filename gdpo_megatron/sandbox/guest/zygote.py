"""The fork server: one clean interpreter that forks a confined child for each program.

It never sees a program. The caller sends, over a socket that keeps messages apart, a header with
the limits and descriptors of what belongs to the run; the server forks, the child reads the program
from its descriptor, confines itself and runs it. So no run can find anything of an earlier one in
its memory.

    caller -> server   header (struct) + [request, stdin, stdout, stderr, value]
    server -> caller   how the child ended (struct), once for each header
    caller -> server   one byte while a run is on: kill it

The server has one thread, and ends when the caller's end of the socket is closed.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time

from gdpo_megatron.sandbox.guest import confine, runner

HEADER = struct.Struct("<IQ")  # CPU seconds, bytes of address space
REPLY = struct.Struct("<iddQ200s")  # wait status, CPU s, wall s, peak RSS bytes, setup fault
NUM_RUN_DESCRIPTORS = 5
_FIRST_FREE = 10  # lower numbers are kept for what a child sees


def serve(control: socket.socket, settings: dict) -> None:
    """Answer requests until the caller is gone.

    Args:
        control: to the caller.
        settings: "confined" (False in unsafe mode), "read_trees", "read_listings", "filter" (hex),
            "own_pid_offsets", "landlock" (False where the kernel has none), "keep" (descriptors
            that children keep: folders that they cannot reach by name).
    """
    ruleset = None
    if settings["confined"] and settings["landlock"]:
        ruleset = confine.make_ruleset(settings["read_trees"], settings["read_listings"])
    instructions = bytes.fromhex(settings["filter"])
    kept = {*settings["keep"], *([] if ruleset is None else [ruleset])}

    def confine_child(cpu_seconds: int, address_space: int) -> None:
        confine.set_limits(cpu_seconds, address_space)
        if settings["confined"]:
            confine.give_up_privileges()
            if ruleset is not None:
                confine.enter_ruleset(ruleset)
            confine.enter_filter(instructions, settings["own_pid_offsets"])

    while True:
        header, descriptors, _, _ = socket.recv_fds(control, HEADER.size, NUM_RUN_DESCRIPTORS)
        if not header:
            return
        if len(header) == 1:
            continue  # a kill that came when its run had ended already
        if len(descriptors) != NUM_RUN_DESCRIPTORS:
            raise RuntimeError("a header without its descriptors")
        child = _run_one(control, HEADER.unpack(header), descriptors, confine_child, kept)
        if not settings["confined"]:  # only then can it have left processes behind
            _kill_group(child, (os.killpg,))


def _run_one(control, limits, descriptors, confine_child, kept) -> int:
    began = time.perf_counter()
    fault_read, fault_write = os.pipe()
    server = os.getpid()
    child = os.fork()
    if child == 0:
        _child(server, limits, descriptors, fault_write, confine_child, kept)
    os.close(fault_write)
    for descriptor in descriptors:
        os.close(descriptor)
    handle = os.pidfd_open(child)
    _wait_or_kill(control, handle, child)
    _, status, usage = os.wait4(child, 0)
    os.close(handle)
    fault = os.read(fault_read, 200)  # of this size only where it could not confine itself
    os.close(fault_read)
    fault = b"" if fault == b"R" else fault or b"ended before it was confined"
    cpu = usage.ru_utime + usage.ru_stime
    control.send(REPLY.pack(status, cpu, time.perf_counter() - began, usage.ru_maxrss << 10, fault))
    return child


def _wait_or_kill(control, handle: int, child: int) -> None:
    poller = select.poll()
    poller.register(handle, select.POLLIN)
    poller.register(control, select.POLLIN)
    while handle not in (ready := {descriptor for descriptor, _ in poller.poll()}):
        if control.fileno() in ready:
            _kill_group(child)
            if not control.recv(1):  # the caller is gone
                os._exit(0)
            poller.unregister(control)  # killed; now only its end is waited for


def _kill_group(child: int, kills=(os.killpg, os.kill)) -> None:
    for kill in kills:  # the first fails while the child has not called setsid
        try:
            kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _child(server, limits, descriptors, fault_write, confine_child, kept) -> None:
    """Never returns."""
    try:
        os.setsid()
        request_read, *standard = descriptors
        for number, descriptor in enumerate(standard):  # stdin, stdout, stderr, value
            os.dup2(descriptor, number)
        request = runner.read_request(request_read)
        _close_all_but({*range(len(standard)), fault_write, *kept})
        confine.die_with(server)
        confine_child(*limits)
        os.write(fault_write, b"R")
        os.close(fault_write)
    except BaseException as error:
        os.write(fault_write, f"{type(error).__name__}: {error}".encode()[:200])
        os._exit(1)
    runner.run(request)


def _close_all_but(kept: set[int]) -> None:
    low = 0
    for number in sorted(kept | {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}):
        if low < number:  # the empty range 0, 0 would mean all of them
            os.closerange(low, number)
        low = number + 1


def main(settings: dict) -> None:
    """Set the server up and serve; descriptor 0 is the socket."""
    if settings["parent"]:
        confine.die_with(settings["parent"])
    if settings["confined"]:
        confine.give_up_privileges()
    control = socket.socket(fileno=fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE))
    # Low numbers are taken, so that a child can put its own files there without losing one.
    nothing = os.open("/dev/null", os.O_RDWR)
    for number in range(_FIRST_FREE):
        if number not in (nothing, 2):  # stderr stays: the caller reads why a server died
            os.dup2(nothing, number)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    runner.preload(settings["packages"])
    # Programs must not find the server's own modules.
    for name in [name for name in sys.modules if name.split(".")[0] == "gdpo_megatron"]:
        del sys.modules[name]
    hello = {"landlock_abi": confine.landlock_abi(), "python": sys.version.split()[0]}
    control.send(json.dumps(hello).encode())
    serve(control, settings)
