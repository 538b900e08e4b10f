"""Starting a job's ranks: one torchrun per node, in a session of its own, ended with care.

Ctrl-C reaches only the launcher. The first one asks the workers to finish their step, save and
leave; a second one ends everything that was started here and nothing else. Whoever is killed takes
along what it started: torchrun gets SIGTERM from the kernel when the launcher is gone, the workers
SIGKILL when torchrun is.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import psutil

from gdpo_megatron.interrupt import INTERRUPTED
from gdpo_megatron.processes import die_with_parent

if TYPE_CHECKING:  # torch takes seconds; --help has no use for it
    from gdpo_megatron.platform.network import Way

# c10d closes what is not complete within these; nodes of a queue come minutes apart.
_MEETING = "join_timeout=900,read_timeout=900"


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOptions:
    """Ranks of a job.

    Args:
        nproc: processes on this node.
        nnodes: nodes.
        node_rank: this node's number; None lets the rendezvous choose.
        rdzv_endpoint: HOST:PORT of the first node; None on a single node, which finds a free port.
    """

    nproc: int = 1
    nnodes: int = 1
    node_rank: int | None = None
    rdzv_endpoint: str | None = None

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nproc * self.nnodes


def torchrun_command(
    options: LaunchOptions, worker: Sequence[str], way: Way | None = None
) -> list[str]:
    """The command that starts this node's ranks.

    Args:
        options: ranks of the job.
        worker: arguments of gdpo_megatron.worker.
        way: from this node to the first one; None leaves it to torch to find its own address.
    """
    command = [sys.executable, "-m", "gdpo_megatron.agent"]
    command += [f"--nproc-per-node={options.nproc}", f"--nnodes={options.nnodes}"]
    if options.rdzv_endpoint is None:
        command += ["--standalone"]
    elif options.node_rank is None:
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={options.rdzv_endpoint}"]
        conf = _MEETING
        if way is not None and way.is_there is not None:
            # Not told, torch looks up this machine's own name, which need not be known.
            conf += f",is_host={str(way.is_there).lower()}"
        command += [f"--rdzv-id=gdpo-{options.rdzv_endpoint}", f"--rdzv-conf={conf}"]
        if way is not None:
            command += [f"--local-addr={way.address}"]
    else:
        # c10d numbers nodes by their addresses, whatever --node-rank says.
        command += ["--rdzv-backend=static", f"--rdzv-endpoint={options.rdzv_endpoint}"]
        command += [f"--node-rank={options.node_rank}"]
    return [*command, "-m", "gdpo_megatron.worker", *worker]


def environment(inherited: Mapping[str, str], way: Way | None = None) -> dict[str, str]:
    """Environment of the workers; what the user set stays.

    Args:
        inherited: of this process.
        way: from this node to the first one of several.
    """
    from gdpo_megatron.platform import detect_platform

    on_way = {} if way is None else way.environment
    # Tokenizers used before a fork would warn in every child of theirs.
    platform = detect_platform().environment
    return {"TOKENIZERS_PARALLELISM": "false", **platform, **on_way, **inherited}


def run(options: LaunchOptions, worker: Sequence[str], *, unit: str) -> int:
    """Start the ranks of this node and wait for them.

    Args:
        options: ranks of the job.
        worker: arguments of gdpo_megatron.worker.
        unit: what an interrupted job finishes and saves first, for the message.

    Returns:
        Exit code: 0 done, 130 interrupted (and saved), otherwise a rank failed.
    """
    from gdpo_megatron.platform.network import way_to

    endpoint = options.rdzv_endpoint if options.nnodes > 1 else None
    way = None if endpoint is None else way_to(endpoint)
    this = os.getpid()
    process = subprocess.Popen(
        torchrun_command(options, worker, way),
        env=environment(os.environ, way),
        start_new_session=True,
        preexec_fn=lambda: die_with_parent(signal.SIGTERM, this),
    )
    interrupts = 0
    told: set[int] = set()

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts == 1:
            print(f"\nfinishing the {unit} and saving; once more ends at once", file=sys.stderr)
        else:
            process.kill()  # the workers die with it

    previous = {n: signal.signal(n, interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        while (code := _wait(process)) is None:
            if interrupts:
                _tell_workers(process.pid, told)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if interrupts and code in (0, -signal.SIGKILL):
        return INTERRUPTED
    return code if code >= 0 else 128 - code  # killed by a signal: as a shell says it


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    """The exit code; None when there is none for now."""
    try:
        return process.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        return None


def _tell_workers(torchrun: int, told: set[int]) -> None:
    """Ask each worker once to save and leave, as soon as it listens; before, it would just die."""
    try:
        for worker in psutil.Process(torchrun).children():
            if worker.pid not in told and _catches_sigterm(worker.pid):
                worker.send_signal(signal.SIGTERM)
                told.add(worker.pid)
    except psutil.NoSuchProcess:
        pass  # gone meanwhile


def _catches_sigterm(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
