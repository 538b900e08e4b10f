"""`gdpo-megatron doctor`: what this machine has, seen by trying, and what to install.

A check is a function that yields findings; `CHECKS` is the table of them. A part of this project
adds a check here, a package through an entry point of the group `gdpo_megatron.doctor`.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from gdpo_megatron.config.sandbox import SandboxConfig
from gdpo_megatron.errors import InputError
from gdpo_megatron.registry import Registry
from gdpo_megatron.sandbox import Limits, SandboxUnavailable
from gdpo_megatron.sandbox.launch import Isolation
from gdpo_megatron.sandbox.pool import start_worker
from gdpo_megatron.sandbox.worker import landlock_abi


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    NOTE = "note"
    """Works without it; something is weaker or smaller than it could be."""
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of the table.

    Args:
        what: what was looked at.
        level: how it is.
        text: what was seen, and what to do about it where something is missing.
    """

    what: str
    level: Level
    text: str


Check = Callable[[], Iterable[Finding]]
CHECKS: Final = Registry[Check]("check", "gdpo_megatron.doctor")

_LAYERS: Final[tuple[tuple[Isolation, str], ...]] = (
    ("bwrap", "namespaces, Landlock, seccomp, limits"),
    ("inner", "Landlock, seccomp, limits"),
)
_GIB = 1 << 30
_SMALL_RAM_GIB, _SMALL_DISK_GIB = 4, 10


def run_doctor(names: Iterable[str] = ()) -> int:
    """Run checks and print the table.

    Args:
        names: of the checks; none: all of them, by name.

    Returns:
        0, or 1 where a finding is a failure.

    Raises:
        InputError: no check of such a name.
    """
    findings: list[Finding] = []
    for name in names or CHECKS.names():
        try:
            findings += CHECKS.get(name)()
        except InputError:  # no such check
            raise
        except Exception as error:  # a check that breaks is itself something to know of
            findings.append(Finding(name, Level.FAIL, f"the check broke: {error!r}"))
    width = max((len(finding.what) for finding in findings), default=0)
    for finding in findings:
        print(f"{finding.level:4}  {finding.what:{width}}  {finding.text}")
    return int(any(finding.level is Level.FAIL for finding in findings))


@CHECKS.register("python")
def check_python() -> Iterator[Finding]:
    """The interpreter."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] == (3, 11):
        yield Finding("python", Level.OK, version)
    else:
        yield Finding("python", Level.NOTE, f"{version}; only 3.11 has been shown to work")


@CHECKS.register("packages")
def check_packages() -> Iterator[Finding]:
    """Packages of which this project needs one exact version."""
    for line in importlib.metadata.requires("gdpo-megatron") or ():
        pinned = re.fullmatch(r"([\w.-]+)==([\w.]+)", line)
        if pinned is None:
            continue
        name, wanted = pinned.groups()
        if name == "megatron-core":  # see check_megatron
            continue
        try:
            there = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, Level.FAIL, f"not installed; pip install {name}=={wanted}")
            continue
        if there.split("+")[0] == wanted:
            yield Finding(name, Level.OK, there)
        else:
            text = f"{there}, but {wanted} is needed; pip install {name}=={wanted}"
            yield Finding(name, Level.FAIL, text)


@CHECKS.register("megatron")
def check_megatron() -> Iterator[Finding]:
    """Megatron-Core, of which more than the version that pip takes will do."""
    from gdpo_megatron.platform.megatron_versions import SUPPORTED, megatron_version, shown

    try:
        version = megatron_version()
    except InputError as error:
        yield Finding("megatron-core", Level.FAIL, str(error))
        return
    (tested,) = (it.tested for it in SUPPORTED if version in it)
    if shown(version) == tested:
        yield Finding("megatron-core", Level.OK, tested)
    else:
        text = f"{shown(version)}; of its kind {tested} is the one that the tests run on"
        yield Finding("megatron-core", Level.NOTE, text)


@CHECKS.register("machine")
def check_machine() -> Iterator[Finding]:
    """Cores, memory and disk."""
    import psutil

    usable, there = len(os.sched_getaffinity(0)), os.cpu_count()
    yield Finding("CPU cores", Level.OK, f"{usable} usable of {there}")
    memory = psutil.virtual_memory()
    small = memory.total < _SMALL_RAM_GIB * _GIB
    text = f"{memory.available / _GIB:.1f} GiB free of {memory.total / _GIB:.1f}"
    yield Finding("memory", Level.NOTE if small else Level.OK, text)
    disk = shutil.disk_usage(Path.cwd())
    small = disk.free < _SMALL_DISK_GIB * _GIB
    text = f"{disk.free / _GIB:.1f} GiB free in the working directory"
    if small:
        text += "; checkpoints take several times the size of the weights"
    yield Finding("disk", Level.NOTE if small else Level.OK, text)


@CHECKS.register("engines")
def check_engines() -> Iterator[Finding]:
    """Rollout engines that a config can name, and whether they can run here."""
    import gdpo_megatron.rollout.engines  # noqa: F401  # registers them
    from gdpo_megatron.rollout.base import engines

    for name in engines.names():
        what = f"rollout engine {name}"
        check = _ENGINE_CHECKS.get(name)
        if check is None:
            yield Finding(what, Level.OK, "registered by a package; not looked into")
        else:
            yield from (Finding(what, level, text) for level, text in check())


def _native_engine() -> Iterator[tuple[Level, str]]:
    yield Level.OK, "runs wherever this package does"


def _vllm_engine() -> Iterator[tuple[Level, str]]:
    """Metadata first: an import takes many seconds, and says less of what is wrong."""
    from gdpo_megatron.platform import vllm_versions

    problems = vllm_versions.vllm_problems()
    if not problems:
        problem = vllm_versions.import_problem()
        if problem is None:
            yield Level.OK, f"{vllm_versions.installed_vllm()}, imported"
            return
        problems = [f"{problem}; {vllm_versions.how_to_install()}"]
    yield from ((Level.NOTE, problem) for problem in problems)


_ENGINE_CHECKS: Final[dict[str, Callable[[], Iterator[tuple[Level, str]]]]] = {
    "native": _native_engine,
    "vllm": _vllm_engine,
}


@CHECKS.register("sandbox")
def check_sandbox() -> Iterator[Finding]:
    """Which isolation the model's programs can have here: each is started and attacked."""
    config = SandboxConfig()
    works: list[str] = []
    findings: list[Finding] = []
    for mode, layers in _LAYERS:
        try:
            start_worker(mode, config, Limits.of(config)).kill()
        except SandboxUnavailable as error:
            findings += [Finding(f"sandbox {mode}", Level.NOTE, text) for text in error.problems]
        else:
            works.append(mode)
            text = f"{layers}: passed its probe"
            findings.append(Finding(f"sandbox {mode}", Level.OK, text))
    yield Finding(
        "sandbox",
        Level.OK if works else Level.FAIL,
        f"sandbox.mode auto takes {works[0]}; Landlock version {landlock_abi() or 'none'}"
        if works
        else "none works here, so rewards cannot run programs; install or allow one of these:",
    )
    yield from findings
