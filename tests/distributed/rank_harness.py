"""Runs a function on several ranks under torchrun and brings back what each rank returned.

The function lives in a module of this folder, takes keyword arguments and returns what
`torch.save` writes and `torch.load(weights_only=True)` reads. A rank that raises, or that has not
returned in time, fails the test with its traceback (of all threads, when it hangs).
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

TAIL = 4000
"""Characters of the ranks' output that a failure message shows."""


def run_ranks(
    task: str,
    world_size: int,
    folder: Path,
    /,
    *,
    timeout: float = 300.0,
    python: str = sys.executable,
    **arguments: Any,
) -> list[Any]:
    """Call `task` on every rank of a new process group.

    Args:
        task: "module:function"; the module is a file of this folder.
        world_size: ranks.
        folder: where ranks leave results and output; a new one for each call.
        timeout: seconds after which everything is ended and the test fails.
        python: the interpreter that runs them.
        **arguments: of the function; plain data and tensors.

    Returns:
        What the function returned, by rank.
    """
    folder.mkdir(parents=True)
    torch.save(arguments, folder / "arguments.pt")
    output = folder / "output.txt"
    command = [
        *(python, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={world_size}", __file__, task, str(folder), str(timeout)),
    ]
    # Of tests/, for what is in support/.
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    with output.open("w") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
        try:
            # A rank that hangs ends itself at `timeout` and says where it was.
            status = process.wait(timeout + 15)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
    results = [folder / f"rank_{rank}.pt" for rank in range(world_size)]
    if status != 0 or not all(path.is_file() for path in results):
        pytest.fail(_report(task, status, folder, output), pytrace=False)
    return [torch.load(path, weights_only=True) for path in results]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End torchrun and its workers, which are not in its process group."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    if process.poll() is None:
        process.kill()
        process.wait()
    for child in family:
        if child.is_running():
            child.kill()


def _report(task: str, status: int | None, folder: Path, output: Path) -> str:
    # The first rank to fail knows why; the others only see their peer leave.
    errors = sorted(folder.glob("rank_*.error"), key=lambda path: path.stat().st_mtime)
    shown = [f"{path.stem}:\n{path.read_text()}" for path in errors if path.stat().st_size]
    outcome = "did not end" if status is None else f"ended with status {status}"
    if not shown:
        shown = ["output of all ranks, end:", output.read_text(errors="replace")[-TAIL:]]
    return "\n".join([f"{task}: torchrun {outcome}; {folder}", *shown])


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


if __name__ == "__main__":
    _rank_main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
