"""Runs attacks in one mode and says what is wrong; also as a program, for another user.

    python harness.py MODE        prints {attack: [problems]} as JSON; {"unavailable": [...]}

What must hold after each: nothing got through, the secret did not come out, nothing was written,
nobody connected, the run ended as it should, and the next honest program is judged right.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from attacks import ATTACKS, Attack

from gdpo_megatron.config.sandbox import SandboxConfig
from gdpo_megatron.sandbox import Sandbox, SandboxUnavailable

VARIABLE = "GDPO_TEST_SECRET"


def quick_config(mode: str, **options) -> SandboxConfig:
    """Limits of time that nothing reaches by being slow; a test that is to reach one sets it."""
    return SandboxConfig(
        mode=mode, cpu_seconds=60, wall_seconds=600.0, memory_mb=256, max_output_kb=64, **options
    )


class Bait:
    """What attacks are after, and whether they got it."""

    def __init__(self, folder: Path):
        self.secret = secrets.token_hex(16)
        self.folder = folder
        folder.chmod(0o777)
        (folder / "secret").write_text(self.secret)
        (folder / "secret").chmod(0o666)
        self._state = self._look()
        self._tcp = socket.create_server(("127.0.0.1", 0))
        port = self._tcp.getsockname()[1]
        self._udp = socket.socket(type=socket.SOCK_DGRAM)
        self._udp.bind(("127.0.0.1", port))
        self._unix = socket.socket(socket.AF_UNIX)
        name = f"gdpo-test-{secrets.token_hex(8)}"
        self._unix.bind(f"\0{name}")
        self._unix.listen()
        self._listeners = (self._tcp, self._udp, self._unix)
        for listener in self._listeners:
            listener.setblocking(False)
        os.environ[VARIABLE] = self.secret
        self._names = {
            "SECRET_FILE": repr(str(folder / "secret")),
            "OPEN_FOLDER": repr(str(folder)),
            "SECRET_VARIABLE": repr(VARIABLE),
            "PORT": str(port),
            "SOCKET": repr(name),
        }

    def close(self) -> None:
        for listener in self._listeners:
            listener.close()
        del os.environ[VARIABLE]

    def source(self, attack: Attack) -> str:
        assignments = "\n".join(f"{name} = {value}" for name, value in self._names.items())
        return f"{assignments}\n{attack.source}"

    def problems(self) -> Iterator[str]:
        if self._look() != self._state:
            yield f"the folder has changed: {self._look()}"
        for listener in self._listeners:
            try:
                listener.recv(1) if listener is self._udp else listener.accept()
                yield f"somebody came to {listener.getsockname()}"
            except BlockingIOError:
                pass

    def _look(self) -> list:
        paths = sorted([self.folder, *self.folder.rglob("*")])
        return [(str(p), oct(p.stat().st_mode), p.stat().st_size) for p in paths]


@contextmanager
def baited() -> Iterator[Bait]:
    with tempfile.TemporaryDirectory(prefix="gdpo-test-") as folder:
        bait = Bait(Path(folder))
        try:
            yield bait
        finally:
            bait.close()


def problems_of(attack: Attack, sandbox: Sandbox, bait: Bait) -> list[str]:
    """Run one attack."""
    limits = replace(
        sandbox.limits, wall_seconds=attack.wall_seconds, cpu_seconds=attack.cpu_seconds
    )
    pids = {worker.pid for worker in sandbox._workers}
    done = sandbox.run(bait.source(attack), limits=limits)
    said = done.stdout + done.stderr
    problems = list(bait.problems())
    if "THROUGH" in said:
        problems.append(f"got through: {said[said.index('THROUGH') :][:200]}")
    if bait.secret in said:
        problems.append("the secret came out")
    if done.status not in attack.ends:
        problems.append(f"ended as {done.status} ({done.detail}): {done.stderr[-300:]}")
    if {worker.pid for worker in sandbox._workers} != pids:
        problems.append("the worker did not survive")
    after = sandbox.run("print(int(input()) * 7)", stdin="6\n")
    if (after.status, after.stdout) != ("ok", "42\n"):
        problems.append(f"the next program was judged wrong: {after}")
    return problems


def main(mode: str) -> None:
    try:
        sandbox = Sandbox(quick_config(mode))
    except SandboxUnavailable as error:
        print(json.dumps({"unavailable": error.problems}))
        return
    with sandbox, baited() as bait:
        found = {name: problems_of(attack, sandbox, bait) for name, attack in ATTACKS.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
