"""A job over two nodes, whose cable is pulled and put back: `python tools/two_nodes.py`.

The nodes are network namespaces of this machine with host names of their own, joined by one cable
(a veth pair). examples/stories/gdpo.yaml runs with its tensor-parallel pair across them. In the
middle of a step the second node's end goes down: nothing is closed, nothing arrives any more. Both
launchers have to end by themselves, soon after `launch.node_timeout_seconds`, and say why. Then
the cable is back, the same command is given on both, and the job goes on from its checkpoint to its
end.

Needs root and Linux's `ip` and `unshare`; exit code 77 where namespaces cannot be made. What it
makes (namespaces, a folder for the run) is removed in the end.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from gdpo_megatron.nodes.watch import ENDING_SECONDS

ROOT = Path(__file__).resolve().parents[1]
NO_NAMESPACES = 77
START_SECONDS = 1500.0  # until a job that should begin or end is given up
ADDRESSES = ("10.213.77.1", "10.213.77.2")
SAVE_INTERVAL = 2


class Failed(Exception):
    """Something did not come as it has to."""


class Node:
    """A namespace and the launcher in it."""

    def __init__(self, number: int, name: str, address: str):
        self.number = number
        self.name = name
        self.address = address
        self.lines: list[str] = []
        self.process: subprocess.Popen[str] | None = None

    def start(self, arguments: Sequence[str], *, any_rank: bool) -> None:
        """Start scripts/run_node.sh in it, under a host name of its own."""
        self.lines = []
        place = {
            "NNODES": "2",
            "NODE_RANK": "any" if any_rank else str(self.number),
            "NPROC_PER_NODE": "1",
            "MASTER_ADDR": ADDRESSES[0],
            "MASTER_PORT": "29500",
            "GDPO_VENV": str(Path(sys.prefix)),
            "OMP_NUM_THREADS": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # there are no names for addresses here
        }
        named = 'hostname "$1"; shift; exec "$@"'
        script = str(ROOT / "scripts/run_node.sh")
        self.process = subprocess.Popen(
            [
                *("ip", "netns", "exec", self.name, "unshare", "--uts", "bash", "-c", named, "-"),
                *(f"node{self.number}", "bash", script, *arguments),
            ],
            env=os.environ | place,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.lines.append(line.rstrip("\n"))
            print(f"  node{self.number} | {line.rstrip()}", flush=True)

    @property
    def output(self) -> str:
        """All that its launcher has said."""
        return "\n".join(self.lines)

    def wait(self, seconds: float) -> int:
        """Its launcher's exit code."""
        assert self.process is not None
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Failed(f"node{self.number} does not end within {seconds:.0f} s") from None
        time.sleep(0.2)  # for the last lines to be read
        return code


def ip(*arguments: str) -> None:
    """Change the network."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def two_nodes() -> Iterator[list[Node]]:
    """Two namespaces with a cable between them, removed in the end with all that runs in them."""
    nodes = [Node(i, f"gdpo{os.getpid()}n{i}", it) for i, it in enumerate(ADDRESSES)]
    try:
        for node in nodes:
            ip("netns", "add", node.name)
        first, second = nodes
        ends = ("cable", "netns", first.name, "type", "veth", "peer", "cable")
        ip("link", "add", *ends, "netns", second.name)
    except (OSError, subprocess.CalledProcessError) as error:
        remove(nodes)
        said = getattr(error, "stderr", None) or str(error)
        print(f"namespaces cannot be made here: {said.strip()}")
        sys.exit(NO_NAMESPACES)
    try:
        for node in nodes:
            ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", "cable")
            for interface in ("lo", "cable"):
                ip("-n", node.name, "link", "set", interface, "up")
        yield nodes
    finally:
        for node in nodes:
            if node.process is not None and node.process.poll() is None:
                node.process.kill()  # its ranks go with it
                node.process.wait()
        remove(nodes)


def remove(nodes: Sequence[Node]) -> None:
    """Remove the namespaces, as far as they are there."""
    for node in nodes:
        with contextlib.suppress(OSError):
            subprocess.run(["ip", "netns", "del", node.name], check=False, capture_output=True)


def wait_for(nodes: Sequence[Node], pattern: str) -> None:
    """Wait until one of the nodes has said something."""
    end = time.monotonic() + START_SECONDS
    while not any(re.search(pattern, node.output) for node in nodes):
        if any(it.process is not None and it.process.poll() is not None for it in nodes):
            raise Failed(f"a node has ended before any said '{pattern}'")
        if time.monotonic() > end:
            raise Failed(f"no node says '{pattern}'")
        time.sleep(0.1)


def show(nodes: list[Node], run_dir: Path, *, steps: int, timeout: float, any_rank: bool) -> None:
    """The whole of it.

    Raises:
        Failed: the job hangs, does not say why it has ended, or does not go on.
    """
    arguments = [
        *("train", str(ROOT / "examples/stories/gdpo.yaml"), "--run_dir", str(run_dir)),
        *("--parallel.tensor_model_parallel_size", "2", "--train.num_steps", str(steps)),
        *("--checkpoint.save_interval", str(SAVE_INTERVAL), "--logging.tensorboard", "false"),
        *("--logging.compare_plan", "false", "--launch.node_timeout_seconds", f"{timeout:g}"),
    ]
    print(f"both nodes: scripts/run_node.sh {' '.join(arguments)}")
    for node in nodes:
        node.start(arguments, any_rank=any_rank)
    wait_for(nodes, rf"step +{SAVE_INTERVAL + 1}/{steps}")
    print("the cable is pulled: ip -n node1 link set cable down", flush=True)
    ip("-n", nodes[1].name, "link", "set", "cable", "down")
    pulled, bound = time.monotonic(), timeout + ENDING_SECONDS
    for node in nodes:
        # On a busy machine all takes longer; a hang would last for half an hour.
        code = node.wait(START_SECONDS)
        seconds = time.monotonic() - pulled
        print(f"node{node.number} has ended after {seconds:.1f} s (bound {bound:g} s) with {code}")
        if code != 1 or "has not been heard of" not in node.output:
            raise Failed(f"node{node.number} does not say that the other one is gone")
    print("the cable is back, and the same command given on both", flush=True)
    ip("-n", nodes[1].name, "link", "set", "cable", "up")
    for node in nodes:
        node.start(arguments, any_rank=any_rank)
    codes = [node.wait(START_SECONDS) for node in nodes]
    said = "\n".join(node.output for node in nodes)
    if codes != [0, 0] or f"step {steps}/{steps}" not in said or "resumed after step" not in said:
        raise Failed(f"the job has not gone on to its end: exit codes {codes}")
    print("gone on from its checkpoint, and done")


def main() -> int:
    """Run it.

    Returns:
        0 where all came as it has to.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=6, help="of the job (6)")
    parser.add_argument("--timeout", type=float, default=10, help="launch.node_timeout_seconds")
    parser.add_argument("--any", action="store_true", help="no node numbers: rendezvous by c10d")
    options = parser.parse_args()
    if "GDPO_ASSETS" not in os.environ and not (ROOT.parent / "shared").is_dir():
        print("no model: set GDPO_ASSETS")
        return NO_NAMESPACES
    folder = Path(tempfile.mkdtemp(prefix="two_nodes_"))
    try:
        with two_nodes() as nodes:
            show(
                nodes,
                folder / "run",
                steps=options.steps,
                timeout=options.timeout,
                any_rank=options.any,
            )
    except Failed as error:
        print(f"FAILED: {error}")
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
