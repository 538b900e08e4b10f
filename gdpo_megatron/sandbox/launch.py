"""How a worker's fork server is started in each mode: the command, its environment, its user."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from gdpo_megatron.sandbox.layout import Layout, make_layout
from gdpo_megatron.sandbox.results import SandboxUnavailable

Isolation = Literal["bwrap", "inner", "unsafe"]
NOBODY = 65534

# The interpreter as with -I and without site, but for a fixed hash seed: the order of a set must
# not depend on the worker that printed it.
_PYTHON_OPTIONS = ("-s", "-P", "-S", "-B", "-X", "utf8")

_BOOT = """
import json, socket, sys, types
control = socket.socket(fileno=0)
message = json.loads(control.recv(1 << 20))
control.detach()
for name, source in message["modules"]:
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, name, "exec"), module.__dict__)
module.main(message["settings"])
"""


@dataclass(frozen=True, slots=True)
class Launch:
    """A process to start.

    Args:
        command: with the boot code as its last argument.
        environment: all of it.
        layout: what its programs may read.
        popen: more arguments for Popen.
        is_child: the fork server is the process that is started itself.
    """

    command: tuple[str, ...]
    environment: dict[str, str]
    layout: Layout
    popen: dict[str, Any] = field(default_factory=dict[str, Any])
    is_child: bool = True


def make_launch(isolation: Isolation, *, allow_numpy: bool) -> Launch:
    """The launch of a mode.

    Raises:
        SandboxUnavailable: a program that the mode needs is missing.
    """
    return _MODES[isolation](allow_numpy)


def _bwrap(allow_numpy: bool) -> Launch:
    program = shutil.which("bwrap")
    if program is None:
        raise SandboxUnavailable(
            "bwrap: the program is not installed (Debian/Ubuntu: apt-get install bubblewrap)"
        )
    layout = make_layout(allow_numpy=allow_numpy, by_descriptor=False)
    command = [program, "--unshare-user", "--unshare-all", "--die-with-parent", "--new-session"]
    command += ["--clearenv", "--cap-drop", "ALL", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    command += ["--hostname", "sandbox"]
    environment = _environment(layout)
    for name, value in environment.items():
        command += ["--setenv", name, value]
    for path in (layout.python, *layout.read_listings, *layout.read_trees):
        if path.startswith("/dev/"):
            command += ["--dev-bind", path, path]
        elif not path.startswith(tuple(f"{folder}/" for folder in layout.read_listings)):
            command += ["--ro-bind", path, path]
    command += ["--remount-ro", "/", "--chdir", "/", "--", *_python(layout)]
    # The environment of bwrap itself can be read from inside.
    return Launch(tuple(command), {"PATH": "/usr/bin:/bin"}, layout, is_child=False)


def _inner(allow_numpy: bool) -> Launch:
    root = os.geteuid() == 0
    layout = make_layout(allow_numpy=allow_numpy, by_descriptor=root)
    popen: dict[str, Any] = {"pass_fds": layout.descriptors, "cwd": "/"}
    if root:
        popen |= {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    return Launch(_python(layout), _environment(layout), layout, popen)


_MODES: dict[Isolation, Callable[[bool], Launch]] = {
    "bwrap": _bwrap,
    "inner": _inner,
    "unsafe": _inner,  # the same, with nothing that confines
}


def _python(layout: Layout) -> tuple[str, ...]:
    return (layout.python, *_PYTHON_OPTIONS, "-c", _BOOT)


def _environment(layout: Layout) -> dict[str, str]:
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": "/",
        "LC_ALL": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "LD_LIBRARY_PATH": layout.library_path,
    }
    # The server must have one thread when it forks.
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment["MALLOC_ARENA_MAX"] = "1"  # else each thread reserves 64 MiB of address space
    return environment | dict.fromkeys(threads, "1")
