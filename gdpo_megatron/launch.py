"""Starting a job's ranks: one torchrun per node, in a session of its own, ended with care.

Ctrl-C reaches only the launcher. The first one asks the workers to finish their step, save and
leave; a second one ends everything that was started here and nothing else. If the launcher itself
is killed, torchrun gets SIGTERM from the kernel and takes its workers along.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

import psutil

from gdpo_megatron.platform import detect_platform

_PR_SET_PDEATHSIG = 1
INTERRUPTED = 130


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


def torchrun_command(options: LaunchOptions, worker: Sequence[str]) -> list[str]:
    """The command that starts this node's ranks.

    Args:
        options: ranks of the job.
        worker: arguments of gdpo_megatron.worker.
    """
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += [f"--nproc-per-node={options.nproc}", f"--nnodes={options.nnodes}"]
    if options.rdzv_endpoint is None:
        command += ["--standalone"]
    else:
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={options.rdzv_endpoint}"]
        command += [f"--rdzv-id=gdpo-{options.rdzv_endpoint}"]
    if options.node_rank is not None:
        command += [f"--node-rank={options.node_rank}"]
    return [*command, "-m", "gdpo_megatron.worker", *worker]


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """Environment of the workers; what the user set stays."""
    # Tokenizers used before a fork would warn in every child of theirs.
    return {"TOKENIZERS_PARALLELISM": "false", **detect_platform().environment, **inherited}


def run(options: LaunchOptions, worker: Sequence[str]) -> int:
    """Start the ranks of this node and wait for them.

    Returns:
        Exit code: 0 done, 130 interrupted and saved, otherwise a rank failed.
    """
    process = subprocess.Popen(
        torchrun_command(options, worker),
        env=environment(os.environ),
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )
    interrupts = 0

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts == 1:
            print("\nfinishing the step and saving; once more ends at once", file=sys.stderr)
            for worker_process in _workers(process.pid):
                worker_process.send_signal(signal.SIGTERM)
        else:
            os.killpg(process.pid, signal.SIGKILL)

    previous = {n: signal.signal(n, interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return INTERRUPTED if interrupts and code in (0, -signal.SIGKILL) else code


def _workers(torchrun: int) -> list[psutil.Process]:
    """The ranks that a torchrun process started."""
    try:
        return psutil.Process(torchrun).children()
    except psutil.NoSuchProcess:
        return []


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
