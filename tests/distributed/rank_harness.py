"""Runs a function on several ranks and brings back what each rank returned.

The function lives in a module of this folder, takes keyword arguments and returns what
`torch.save` writes and `torch.load(weights_only=True)` reads. A rank that raises, or that has not
returned in time, fails the test with its traceback (of all threads, when it hangs).

torchrun would have each rank of each test import torch and Megatron, 5 s of CPU time. So ranks are
forked from a process that has imported them, with the variables that torchrun sets and a store as
its agent has. What differs: all ranks have one hash seed, so an order that a set decides is the
same everywhere; tests/e2e has torchrun's ranks. And torch's profiler sees no memory in a forked
process: a test that measures it names an interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.distributed import TCPStore

FORK = "fork"
"""As its only argument this file is the process that ranks are forked from."""

READY = b"ready\n"
PRELOAD_SECONDS = 600.0  # its imports take 5 s of CPU time

TAIL = 4000
"""Characters of the ranks' output that a failure message shows."""


def run_ranks(
    task: str,
    world_size: int,
    folder: Path,
    /,
    *,
    timeout: float = 900.0,
    python: str | None = None,
    **arguments: Any,
) -> list[Any]:
    """Call `task` on every rank of a new process group.

    Args:
        task: "module:function"; the module is a file of this folder.
        world_size: ranks.
        folder: where ranks leave results and output; a new one for each call.
        timeout: seconds after which everything is ended and the test fails.
        python: the interpreter that torchrun runs them with; None: they are forked.
        **arguments: of the function; plain data and tensors.

    Returns:
        What the function returned, by rank.
    """
    folder.mkdir(parents=True)
    torch.save(arguments, folder / "arguments.pt")
    output = folder / "output.txt"
    if python is None:
        status = _forked(task, world_size, folder, timeout)
    else:
        status = _under_torchrun(task, world_size, folder, timeout, python)
    results = [folder / f"rank_{rank}.pt" for rank in range(world_size)]
    if status != 0 or not all(path.is_file() for path in results):
        pytest.fail(_report(task, status, folder, output), pytrace=False)
    return [torch.load(path, weights_only=True) for path in results]


def _environment() -> dict[str, str]:
    # Of tests/, for what is in support/.
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(paths),
    }


def _under_torchrun(
    task: str, world_size: int, folder: Path, timeout: float, python: str
) -> int | None:
    command = [
        *(python, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={world_size}", __file__, task, str(folder), str(timeout)),
    ]
    with (folder / "output.txt").open("w") as stream:
        process = subprocess.Popen(command, env=_environment(), stdout=stream, stderr=stream)
        try:
            # A rank that hangs ends itself at `timeout` and says where it was.
            return process.wait(timeout + 60)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)


def _forked(task: str, world_size: int, folder: Path, timeout: float) -> int | None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torchrun = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
    }
    request = {
        "task": task,
        "world_size": world_size,
        "folder": str(folder),
        "timeout": timeout,
        "environment": {**_environment(), **torchrun},
    }
    parent = _parent_of_ranks()
    assert parent.stdin is not None
    answer = b""
    try:
        parent.stdin.write(json.dumps(request).encode() + b"\n")
        parent.stdin.flush()
        # A rank that hangs ends itself at `timeout` and says where it was.
        answer = _line_of(parent, timeout + 60)
    finally:
        if not answer:  # it hangs, is gone, or the tests are being interrupted
            _parent_of_ranks.cache_clear()
            _end(parent)
    return int(answer) if answer else None


@functools.cache
def _parent_of_ranks() -> subprocess.Popen[bytes]:
    """The process that ranks are forked from; it ends with this one's end of its pipe."""
    log = tempfile.TemporaryFile()  # the process keeps it
    process = subprocess.Popen(
        [sys.executable, "-u", __file__, FORK],
        env=_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
    )
    atexit.register(_end, process)
    if _line_of(process, PRELOAD_SECONDS) != READY:
        _end(process)
        log.seek(0)
        said = log.read()[-TAIL:].decode(errors="replace")
        pytest.fail(f"the process that ranks are forked from does not start:\n{said}")
    return process


def _line_of(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """A line that it prints; nothing when it ends or that takes too long."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    return process.stdout.readline() if ready else b""


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and what is below it, which may be in other process groups."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    if process.poll() is None:
        process.kill()
        process.wait()
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def _report(task: str, status: int | None, folder: Path, output: Path) -> str:
    # The first rank to fail knows why; the others only see their peer leave.
    errors = sorted(folder.glob("rank_*.error"), key=lambda path: path.stat().st_mtime)
    shown = [f"{path.stem}:\n{path.read_text()}" for path in errors if path.stat().st_size]
    outcome = "did not end" if status is None else f"ended with status {status}"
    if not shown:
        text = output.read_text(errors="replace") if output.exists() else "none was started"
        shown = ["output of all ranks, end:", text[-TAIL:]]
    return "\n".join([f"{task}: the ranks {outcome}; {folder}", *shown])


def _rank_main(task: str, folder: Path, timeout: float) -> None:
    rank = os.environ["RANK"]
    started = time.monotonic()
    with (folder / f"rank_{rank}.error").open("w") as errors:
        faulthandler.dump_traceback_later(timeout, exit=True, file=errors)
        try:
            module_name, function = task.split(":")
            module = importlib.import_module(module_name)
            arguments = torch.load(folder / "arguments.pt", weights_only=True)
            result = getattr(module, function)(**arguments)
        except BaseException:
            errors.write(traceback.format_exc())
            raise
        faulthandler.cancel_dump_traceback_later()
    torch.save(result, folder / f"rank_{rank}.pt")
    print(f"rank {rank}: {task} took {time.monotonic() - started:.1f} s", flush=True)
    if torch.distributed.is_initialized():
        # Leaving while a peer still talks would look like a crash to it.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _serve() -> None:
    """Fork ranks as asked, one request after the other, and answer with a status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the tests to decide on
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    try:
        importlib.import_module("rank_layouts")  # and with it all that most ranks import
    except Exception:
        traceback.print_exc()  # a rank that needs it will say so
    gc.freeze()
    answers.write(READY)
    answers.flush()
    for line in requests:
        request = json.loads(line)
        # A forked process has one thread, and nobody frees the locks that others held.
        assert len([*Path("/proc/self/task").iterdir()]) == 1, "an import has started a thread"
        ranks = set()
        for rank in range(request["world_size"]):
            pid = os.fork()
            if pid == 0:
                requests.close()
                answers.close()
                _forked_main(rank, request)
                return
            ranks.add(pid)
        answers.write(f"{_wait(ranks)}\n".encode())
        answers.flush()


def _wait(ranks: set[int]) -> int:
    """Wait for all; as torchrun does, end the others when one fails. Returns the first failure."""
    first = 0
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        if status and not first:
            first = os.waitstatus_to_exitcode(status)
            for other in ranks:
                os.kill(other, signal.SIGTERM)
    return first


def _forked_main(rank: int, request: Mapping[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = Path(request["folder"])
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(request["environment"], RANK=str(rank), LOCAL_RANK=str(rank))
    _rank_main(request["task"], folder, request["timeout"])


if __name__ == "__main__":
    if sys.argv[1:] == [FORK]:
        _serve()
    else:
        _rank_main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
