"""What a machine has for a run, seen without starting anything: `Facts`, and `gather`, which looks.

What of it speaks against a run is said in diagnosis.py, from the facts alone.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil
import torch
from torch.cuda import nccl

from gdpo_megatron.platform.pins import Row, rows

_PROC_DRIVER: Final = Path("/proc/driver/nvidia/version")
_DEV: Final = Path("/dev")
_INFINIBAND: Final = Path("/sys/class/infiniband")
_SHARED_MEMORY: Final = Path("/dev/shm")
_IMPORT_SECONDS: Final = 300.0

# Made by container engines and hypervisors: no other node is behind them.
_INNER_INTERFACES: Final = ("docker", "br-", "veth", "virbr", "cni", "flannel", "cali", "podman")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU that torch sees.

    Args:
        name: of the model.
        capability: compute capability, (9, 0) of Hopper.
        memory: bytes.
    """

    name: str
    capability: tuple[int, int]
    memory: int


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface that is up, other than the loopback.

    Args:
        name: as the system calls it.
        address: IPv4, or else IPv6; empty where it has none.
        megabits: speed; 0 where it is not known.
    """

    name: str
    address: str
    megabits: int

    @property
    def reaches_others(self) -> bool:
        """Whether other machines may be behind it."""
        return bool(self.address) and not self.name.startswith(_INNER_INTERFACES)


@dataclass(frozen=True, slots=True)
class Facts:
    """What was seen of a machine and of this process's environment.

    Args:
        python: version of the interpreter, as in `3.11`.
        torch: version of torch.
        toolkit: of CUDA that torch was built with; None of a build for CPUs.
        gpus: that torch sees.
        devices: number of GPUs that the driver offers to this container or machine.
        driver: version of the GPU's driver; None where none is loaded.
        nccl: its version; None where torch has none.
        packages: version by package, of those in the table of versions that are installed.
        apex: "none", "nvidia" or "other".
        missing_for_fp8: what torch's FP8 product lacks; None where it runs.
        transformer_engine_problem: why an import of it fails; None where it works or is not there.
        interfaces: see `Interface`.
        host: its name, and the address that it stands for; None where it stands for none.
        adapters: InfiniBand or RoCE ports by name, and whether each is active.
        shared_memory: bytes of /dev/shm; None where there is none.
        locked_memory: bytes that a process may lock; None without a limit.
        variables: environment.
    """

    python: str = "3.11"
    torch: str = "2.13.0+cpu"
    toolkit: str | None = None
    gpus: tuple[Gpu, ...] = ()
    devices: int = 0
    driver: str | None = None
    nccl: tuple[int, ...] | None = None
    packages: Mapping[str, str] = field(default_factory=dict)
    apex: str = "none"
    missing_for_fp8: str | None = None
    transformer_engine_problem: str | None = None
    interfaces: tuple[Interface, ...] = ()
    host: tuple[str, str | None] = ("localhost", "127.0.0.1")
    adapters: Mapping[str, bool] = field(default_factory=dict)
    shared_memory: int | None = None
    locked_memory: int | None = None
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def collectives(self) -> str | None:
        """Version of what ranks on GPUs talk through."""
        return ".".join(map(str, self.nccl)) if self.nccl else None

    @property
    def row(self) -> Row:
        """The row of the table of versions that this environment is of."""
        return rows()["gpu" if self.toolkit else "cpu"]


# ---- looking -------------------------------------------------------------------------------------


def gather(*, try_imports: bool = False) -> Facts:
    """Look at this machine.

    Args:
        try_imports: import Transformer Engine in another process, where it is installed.
    """
    from gdpo_megatron.platform import detect_platform

    table = rows().values()
    names = {name for row in table for name in (*row.packages, *row.beside)}
    packages = {name: version for name in names if (version := _version(name)) is not None}
    toolkit = torch.version.cuda
    has_engine = importlib.util.find_spec("transformer_engine") is not None
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return Facts(
        python=".".join(map(str, sys.version_info[:2])),
        torch=torch.__version__,
        toolkit=toolkit,
        gpus=tuple(map(_gpu, range(torch.cuda.device_count()))) if toolkit else (),
        devices=sum(bool(re.fullmatch(r"nvidia\d+", it.name)) for it in _DEV.iterdir()),
        driver=driver_version(_text(_PROC_DRIVER)),
        nccl=nccl.version()[:3] if toolkit else None,
        packages=packages,
        apex=_apex(),
        missing_for_fp8=detect_platform().missing_for_fp8(),
        transformer_engine_problem=_engine_problem() if try_imports and has_engine else None,
        interfaces=tuple(_interfaces()),
        host=_host(),
        adapters=_adapters(),
        shared_memory=shutil.disk_usage(_SHARED_MEMORY).total if _SHARED_MEMORY.is_dir() else None,
        locked_memory=None if locked == resource.RLIM_INFINITY else locked,
        variables=dict(os.environ),
    )


def driver_version(text: str) -> str | None:
    """`580.95.05` of what the kernel says of NVIDIA's module; None of an empty text."""
    found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(index: int) -> Gpu:
    seen = torch.cuda.get_device_properties(index)
    return Gpu(seen.name, (seen.major, seen.minor), seen.total_memory)


def _apex() -> str:
    """Whose `apex` an import would find; that of the package index is a web toolkit."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "none"
    places = spec.submodule_search_locations or ()
    return "nvidia" if any(Path(place, "optimizers").is_dir() for place in places) else "other"


def _engine_problem() -> str | None:
    command = [sys.executable, "-c", "import torch, transformer_engine.pytorch"]
    try:
        ended = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_IMPORT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"importing it took more than {_IMPORT_SECONDS:.0f} s"
    said = ended.stdout.strip().splitlines()
    return None if ended.returncode == 0 else (said[-1] if said else f"status {ended.returncode}")


def _interfaces() -> Iterator[Interface]:
    states = psutil.net_if_stats()
    for name, addresses in sorted(psutil.net_if_addrs().items()):
        state = states.get(name)
        if state is None or not state.isup or name == "lo":
            continue
        by_family = {it.family: it.address for it in reversed(addresses)}
        address = by_family.get(socket.AF_INET) or by_family.get(socket.AF_INET6) or ""
        yield Interface(name, address, state.speed)


def _host() -> tuple[str, str | None]:
    name = socket.gethostname()
    try:
        return name, socket.gethostbyname(name)
    except OSError:
        return name, None


def _adapters() -> dict[str, bool]:
    return {
        f"{path.parents[2].name}:{path.parent.name}": "ACTIVE" in _text(path)
        for path in sorted(_INFINIBAND.glob("*/ports/*/state"))
    }
