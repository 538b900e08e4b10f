"""`gdpo-megatron doctor`: what this machine has, seen by trying, and what to install.

A check is a function that yields findings; `CHECKS` is the table of them. A part of this project
adds a check here, a package through an entry point of the group `gdpo_megatron.doctor`.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from gdpo_megatron.config.sandbox import SandboxConfig
from gdpo_megatron.errors import InputError
from gdpo_megatron.platform.findings import Finding, Level
from gdpo_megatron.registry import Registry
from gdpo_megatron.sandbox import Limits, SandboxUnavailable
from gdpo_megatron.sandbox.launch import Isolation
from gdpo_megatron.sandbox.pool import start_worker
from gdpo_megatron.sandbox.worker import landlock_abi

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
    from gdpo_megatron.platform.pins import rows

    version = ".".join(map(str, sys.version_info[:3]))
    minor = ".".join(map(str, sys.version_info[:2]))
    if minor == rows()["cpu"].python:
        yield Finding("python", Level.OK, version)
    else:
        shown = rows()["cpu"].python
        yield Finding("python", Level.NOTE, f"{version}; only {shown} has been shown to work")


@CHECKS.register("packages")
def check_packages() -> Iterator[Finding]:
    """Versions against the table of those that belong together."""
    from gdpo_megatron.platform import diagnosis, machine

    yield from diagnosis.versions(machine.gather())


@CHECKS.register("hardware")
def check_hardware() -> Iterator[Finding]:
    """GPUs, their driver, and whether this torch can use them."""
    from gdpo_megatron.platform import diagnosis, machine

    yield from diagnosis.hardware(machine.gather())


@CHECKS.register("precision")
def check_precision() -> Iterator[Finding]:
    """bfloat16, FP8 and Transformer Engine."""
    from gdpo_megatron.platform import diagnosis, machine

    yield from diagnosis.precision(machine.gather(try_imports=True))


@CHECKS.register("network")
def check_network() -> Iterator[Finding]:
    """What ranks on several nodes would talk through."""
    from gdpo_megatron.platform import diagnosis, machine

    yield from diagnosis.network(machine.gather())


@CHECKS.register("environment")
def check_environment() -> Iterator[Finding]:
    """Variables that change how a run works, and limits of a container."""
    from gdpo_megatron.platform import diagnosis, machine

    yield from diagnosis.environment(machine.gather())


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
