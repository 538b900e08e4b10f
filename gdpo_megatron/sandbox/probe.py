"""Sees for itself that a worker confines: attacks that must fail, honest programs that must not.

Done before a worker serves and again after each respawn, always in full: one run tries most attacks
and says which got through, three more need a limit each. A sandbox that blocks everything would
look perfect, hence the honest program. Attacks use arguments that do no harm where they succeed.
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from gdpo_megatron.sandbox.results import Execution, Limits, Status
from gdpo_megatron.sandbox.worker import Worker

CANARY_VARIABLE = "GDPO_SANDBOX_CANARY"
_PATIENCE_SECONDS = 60

# Each line: a name and an expression that raises OSError, or is falsy, where the attack fails.
# `call` makes a raw system call; a refusal is EPERM, EACCES or ENOSYS. A call that was let in and
# fails on its nonsense arguments with something else counts as through.
_ATTACKS = {
    "fork": "os.fork() or os._exit(0)",
    "fork by number": "call(57) or os._exit(0)",
    "exec": "call(59, b'/nonexistent', None, None)",
    "TCP socket": "call(41, 2, 1, 0)",
    "UDP socket": "call(41, 2, 2, 0)",
    "unix socket": "call(41, 1, 1, 0)",
    "socket pair": "call(53, 99, 1, 0, None)",
    "signal to the parent": "call(62, os.getppid(), 0) == 0",
    "signal to everybody": "call(62, -1, 0) == 0",
    "signal by fcntl": "call(72, 1, 8, os.getppid()) == 0",
    "ptrace": "call(101, 3, 999999999, 0, 0)",
    "reading another process": "call(310, 999999999, None, 0, None, 0, 0)",
    "user namespace": "call(272, 0x10000000) == 0",
    "mount": "call(165, None, None, None, 0, None)",
    "io_uring": "call(425, 0, None)",
    "bpf": "call(321, -1, None, 0)",
    "new session": "call(112) > 0",
    "prctl": "call(157, 3, 0, 0, 0, 0) >= 0",
    "limits of the parent": "call(302, os.getppid(), 0, None, None) == 0",
    "changing a limit": "call(160, 4, b'\\0' * 16) == 0",  # of core dumps: 0 CPU seconds would kill
    "memory file": "call(319, b'x', 0) >= 0",
    "chmod": "call(90, b'/nonexistent', 0) == 0 or os.chmod(CANARY_FILE, 0o777) is None",
    "reading a file": "open(CANARY_FILE).read()",
    "reading the accounts": "open('/etc/passwd').read()",
    "reading /proc": "open('/proc/self/environ').read()",
    "writing beside the canary": "open(CANARY_FILE + '.new', 'w')",
    "writing to the canary": "open(CANARY_FILE, 'a')",
    "writing to /tmp": "open('/tmp/gdpo-sandbox-probe', 'w')",
    "writing to shared memory": "open('/dev/shm/gdpo-sandbox-probe', 'w')",
    "making a folder": "os.mkdir('/tmp/gdpo-sandbox-probe') is None",
    "the caller's environment": "CANARY_VARIABLE in os.environ",
    "another number range": "call(0x40000000 + 39) > 0",
}

_PROGRAM = """
import ctypes, errno, json, os, resource, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
REFUSED = (errno.EPERM, errno.ENOSYS, errno.EACCES)
CANARY_FILE, CANARY_VARIABLE, attacks = json.loads(sys.stdin.readline())
def call(*arguments):
    result = libc.syscall(*arguments)
    if result >= 0:
        return result
    if ctypes.get_errno() in REFUSED:
        raise OSError(ctypes.get_errno(), "refused")
    raise LetIn
class LetIn(Exception):
    pass
through = []
for name, attack in attacks.items():
    try:
        if eval(attack):
            through.append(name)
    except LetIn:
        through.append(name)
    except OSError:
        pass
print(json.dumps(through))
"""

_HONEST = """
import decimal, heapq, json, math, re, string, sys, threading
seen = []
thread = threading.Thread(target=lambda: seen.append(math.gcd(12, 18)))
thread.start()
thread.join()
print(seen[0] + int(sys.stdin.readline()), decimal.Decimal(1) / 8, json.dumps([1]))
"""


def probe(worker: Worker, limits: Limits, *, allow_numpy: bool) -> list[str]:
    """Try a worker.

    Args:
        worker: that has served nothing yet.
        limits: of its runs; the probe's are these or tighter, but for time: how busy the machine is
            at the moment is not asked here.
        allow_numpy: whether a program must be able to import numpy, or must not.

    Returns:
        What is wrong, a line each; empty for a good worker. In unsafe mode only the honest program
        is asked for.
    """
    return [f"{worker.isolation}: {problem}" for problem in _problems(worker, limits, allow_numpy)]


def _problems(worker: Worker, limits: Limits, allow_numpy: bool) -> Iterator[str]:
    patient = replace(
        limits,
        cpu_seconds=max(limits.cpu_seconds, _PATIENCE_SECONDS),
        wall_seconds=max(limits.wall_seconds, 5.0 * _PATIENCE_SECONDS),
    )

    def run(program: str, stdin: str = "", tight: Limits = patient) -> Execution:
        return worker.execute({"sources": [["main.py", program]]}, stdin.encode(), tight)

    honest = run(_HONEST, "1\n")
    if honest.stdout != "7 0.125 [1]\n" or honest.status is not Status.OK:
        yield f"an honest program fails: {_shown(honest)}"
        return
    if allow_numpy:
        counted = run("import numpy\nprint(numpy.arange(4).sum(), numpy.linalg.det(numpy.eye(2)))")
        if counted.stdout != "6 1.0\n":
            yield f"numpy does not work: {_shown(counted)}"
    if worker.isolation == "unsafe":
        return
    if not allow_numpy and run("import numpy").status is Status.OK:
        yield "numpy can be imported, although sandbox.allow_numpy is false"
    yield from _attack(run)
    yield from _limits(run, patient)


def _attack(run: Callable[..., Execution]) -> Iterator[str]:
    token = secrets.token_hex(16)
    before = os.environ.get(CANARY_VARIABLE)
    os.environ[CANARY_VARIABLE] = token
    try:
        with tempfile.TemporaryDirectory(prefix="gdpo-sandbox-") as folder:
            canary = Path(folder, "canary")
            canary.write_text(token)
            Path(folder).chmod(0o755)  # what protects it must be the sandbox
            canary.chmod(0o666)
            asked = json.dumps([str(canary), CANARY_VARIABLE, _ATTACKS])
            done = run(_PROGRAM, asked + "\n")
    finally:
        if before is None:
            del os.environ[CANARY_VARIABLE]
        else:
            os.environ[CANARY_VARIABLE] = before
    try:
        through = json.loads(done.stdout)
    except ValueError:
        yield f"the attacks did not come to their end: {_shown(done)}"
        return
    yield from (f"an attack got through: {name}" for name in through)
    if token in done.stdout + done.stderr:
        yield "an attack got through: the canary was read"


def _limits(run: Callable[..., Execution], limits: Limits) -> Iterator[str]:
    short = replace(limits, wall_seconds=min(0.3, limits.wall_seconds))
    small = replace(limits, output_bytes=min(1 << 12, limits.output_bytes))
    for what, expected, done in (
        ("memory", Status.MEMORY, run(f"x = bytearray({limits.memory_bytes * 5 // 4})")),
        ("wall clock", Status.TIMEOUT, run("import time\ntime.sleep(60)", "", short)),
        ("output", Status.OUTPUT_LIMIT, run("while True: print('x' * 999)", "", small)),
    ):
        if done.status is not expected:
            yield f"the {what} limit does not hold: {_shown(done)}"


def _shown(done: Execution) -> str:
    last = done.stderr.strip().splitlines()[-1:]
    return ", ".join([str(done.status), *filter(None, [done.detail]), *last])[:300]
