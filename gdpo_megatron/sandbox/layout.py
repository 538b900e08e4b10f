"""What a program may read: the standard library, shared libraries, and numpy where allowed.

A program of user 65534 may be unable to reach these by name (an interpreter below a home folder
that is closed to others). The root user then opens the two folders and hands them down: in the
names below, "/proc/self/fd/N" stands for such a folder, and Landlock sees the folder itself.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdpo_megatron.sandbox.results import SandboxUnavailable

_SYSTEM = (
    "/lib64",
    "/usr/lib64",
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/usr/share/zoneinfo",
    "/dev/null",
    "/dev/urandom",
)
_FIRST_DESCRIPTOR = 10
# Parts of the standard library's folder that are none of it, or of no use to a program.
_NOT_LIBRARY = ("site-packages", "dist-packages", "test", "idlelib", "ensurepip", "lib2to3")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things are, for the processes of one worker.

    Args:
        python: the interpreter, without any virtual environment.
        library_path: folder of its shared library.
        read_trees: files and folders that programs may read.
        read_listings: folders that they may list.
        packages: name -> folder of packages to import beforehand.
        descriptors: folders that are handed down, to be closed after the start.
    """

    python: str
    library_path: str
    read_trees: tuple[str, ...]
    read_listings: tuple[str, ...]
    packages: dict[str, str]
    descriptors: tuple[int, ...] = ()


def make_layout(*, allow_numpy: bool, by_descriptor: bool) -> Layout:
    """Look up where this interpreter's parts are.

    Args:
        allow_numpy: numpy's folder belongs to it.
        by_descriptor: name everything but the system's folders through open descriptors.

    Raises:
        SandboxUnavailable: there is no such interpreter, or no numpy.
    """
    prefix = Path(sys.base_prefix).resolve()
    name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    outside_venv: dict[str, Any] = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    outside_venv |= {f"installed_{name}": value for name, value in outside_venv.items()}
    libraries = [
        Path(sysconfig.get_path(kind, vars=outside_venv)).resolve()
        for kind in ("stdlib", "platstdlib")
    ]
    if not (prefix / "bin" / name).is_file() or not all(
        p.is_relative_to(prefix) for p in libraries
    ):
        raise SandboxUnavailable(f"sandbox: no interpreter {prefix}/bin/{name} with its library")
    opened: list[int] = []

    def reach(folder: Path) -> str:
        if not by_descriptor:
            return str(folder)
        low = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        # A child puts its own files on the first numbers.
        opened.append(fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, _FIRST_DESCRIPTOR))
        os.close(low)
        return f"/proc/self/fd/{opened[-1]}"

    root = reach(prefix)
    listings = list(dict.fromkeys(f"{root}/{p.relative_to(prefix)}" for p in libraries))
    parts = [
        f"{root}/{entry.relative_to(prefix)}"
        for library in dict.fromkeys(libraries)
        for entry in sorted(library.iterdir())
        if entry.name not in _NOT_LIBRARY
    ]
    parts += [f"{root}/lib/{entry.name}" for entry in sorted((prefix / "lib").glob("lib*.so*"))]
    packages: dict[str, str] = {}
    if allow_numpy:
        site = _folder_of("numpy")
        packages["numpy"] = reach(site)
        parts += [
            f"{packages['numpy']}/{n}" for n in ("numpy", "numpy.libs") if (site / n).is_dir()
        ]
    return Layout(
        python=f"{root}/bin/{name}",
        library_path=f"{root}/lib",
        read_trees=(*(path for path in _SYSTEM if Path(path).exists()), *parts),
        read_listings=tuple(listings),
        packages=packages,
        descriptors=tuple(opened),
    )


def _folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SandboxUnavailable(
            f"sandbox.allow_numpy is true, but {package} is not installed: pip install {package}"
        )
    return Path(spec.origin).resolve().parent.parent
