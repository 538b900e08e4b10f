"""What a check may start: ranks under torchrun, and commands of `gdpo-megatron`; all ends in time.

Whatever happens to a check, nothing that it started outlives it: at its limit, or when it is left,
its processes and those below them are killed, and only those.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from gdpo_megatron.certify.check import CheckFailed, Findings, Situation, findings_from
from gdpo_megatron.launch import environment
from gdpo_megatron.processes import die_with_parent

_LOOK_SECONDS = 0.1
_TOLD_LINES = 3
"""Of a command that failed, in the certificate; all of it is in the log."""


class Job:
    """One check at work.

    Args:
        folder: of its own; exists. Output goes to `log.txt` there.
        situation: what it is run with.
        seconds: until its limit.
    """

    def __init__(self, folder: Path, situation: Situation, seconds: float):
        self.folder, self.situation = folder, situation
        self._seconds, self._end = seconds, time.monotonic() + seconds
        self._num_launches = 0

    def findings(self, function: str, num_ranks: int, /, **arguments: Any) -> Findings:
        """What a function of `ranks` found on rank 0."""
        return findings_from(self.ranks(function, num_ranks, **arguments))

    def ranks(self, function: str, num_ranks: int, /, **arguments: Any) -> Any:
        """Call a function on every rank of a process group, under torchrun.

        Args:
            function: "module:function"; it is given the platform, `folder`, which is this job's,
                and the arguments.
            num_ranks: processes.
            arguments: what JSON can hold.

        Returns:
            What rank 0's call returned.

        Raises:
            CheckFailed: a rank failed, or the limit was reached.
        """
        self._num_launches += 1
        folder = self.folder / f"ranks_{self._num_launches}"
        folder.mkdir()
        arguments = {"folder": str(self.folder), **arguments}
        (folder / "arguments.json").write_text(json.dumps(arguments), encoding="utf-8")
        # torchrun itself: this project's agent of a node knows the jobs of a config alone.
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1"]
        command += [f"--nproc-per-node={num_ranks}", "-m", "gdpo_megatron.certify.rank"]
        command += [function, str(folder), str(max(1.0, 0.9 * self._left()))]
        with self.started(command) as running:
            code = running.wait()
        # The first rank to fail knows why; the others only see their peer leave.
        errors = sorted(folder.glob("rank_*.error"), key=lambda path: path.stat().st_mtime)
        for path in errors:
            raise CheckFailed(path.read_text(encoding="utf-8"))
        if code != 0:
            raise CheckFailed(f"a rank ended without a word (exit code {code}); see log.txt")
        return json.loads((folder / "rank_0.json").read_text(encoding="utf-8"))

    def command(self, *words: str | Path) -> str:
        """Run a `gdpo-megatron` command to its end.

        Returns:
            What it printed.

        Raises:
            CheckFailed: it ended with another exit code than 0, or the limit was reached.
        """
        with self.started(cli(*words)) as running:
            code = running.wait()
        if code != 0:
            told = [line for line in running.output().splitlines() if line.strip()]
            said = " / ".join(told[-_TOLD_LINES:])
            raise CheckFailed(f"gdpo-megatron {words[0]} ended with exit code {code}: {said}")
        return running.output()

    @contextlib.contextmanager
    def started(self, command: Sequence[str]) -> Iterator[Running]:
        """Start a command; when the block is left, nothing of it runs on."""
        log = self.folder / "log.txt"
        with log.open("ab") as stream:
            begin = stream.tell()
            process = subprocess.Popen(
                command,
                env=environment(os.environ),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(signal.SIGTERM),
            )
            running = Running(process, log, begin, self._left, self._seconds)
            try:
                yield running
            finally:
                running.kill()

    def _left(self) -> float:
        return self._end - time.monotonic()


class Running:
    """A command that was started.

    Args:
        process: its process.
        log: where its output goes.
        begin: where in the log that begins.
        left: seconds until its limit.
        seconds: the limit, for messages.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        log: Path,
        begin: int,
        left: Callable[[], float],
        seconds: float,
    ):
        self._process, self._log, self._begin = process, log, begin
        self._left, self._seconds = left, seconds

    def output(self) -> str:
        """What it has printed so far."""
        return self._log.read_bytes()[self._begin :].decode(errors="replace")

    def wait(self) -> int:
        """Wait until it has ended; its exit code."""
        try:
            return self._process.wait(max(0.0, self._left()))
        except subprocess.TimeoutExpired:
            raise self._late() from None

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition.

        Raises:
            CheckFailed: it ended before `what`, or the limit was reached.
        """
        while not condition():
            if self._process.poll() is not None and not condition():
                raise CheckFailed(f"ended (exit code {self._process.returncode}) before {what}")
            if self._left() <= 0:
                raise self._late()
            time.sleep(_LOOK_SECONDS)

    def kill(self) -> None:
        """End it and all below it with SIGKILL; they may be in other process groups."""
        if self._process.poll() is not None:  # its number may be another's by now
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(self._process.pid).children(recursive=True)
            self._process.kill()
            for child in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        self._process.wait()

    def _late(self) -> CheckFailed:
        return CheckFailed(f"not done after {self._seconds:.0f} s; see log.txt")


def cli(*words: str | Path) -> list[str]:
    """The command line of `gdpo-megatron`, of this interpreter."""
    return [sys.executable, "-m", "gdpo_megatron.cli", *map(str, words)]
