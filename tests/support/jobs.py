"""Real jobs for end-to-end tests: started as a user would, ended whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

SECONDS = 900  # until a job is given up; on an idle machine they take 10 to 20


@dataclass(frozen=True)
class Ended:
    """How a job ended; stdout and stderr together, in their order."""

    code: int
    output: str


class RunningJob:
    """A command whose output is read while it runs.

    Args:
        command: what to start.
        environment: variables to add.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]):
        self.process = subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self._lines.extend(self.process.stdout)

    @property
    def output(self) -> str:
        return "".join(self._lines)

    def wait_for(self, text: str) -> None:
        """Wait until the job has written `text`."""
        self.wait_until(lambda: text in self.output, f"no '{text}'")

    def wait_until(self, condition: Callable[[], bool], complaint: str) -> None:
        """Wait for a condition; the test fails when the job ends first, or takes too long."""
        end = time.monotonic() + SECONDS
        while not condition():
            ended = self.process.poll() is not None
            if (ended and not condition()) or time.monotonic() > end:
                pytest.fail(f"{complaint}; the job wrote:\n{self.output[-4000:]}", pytrace=False)
            time.sleep(0.05)

    def wait(self) -> Ended:
        """Wait until the job has ended."""
        try:
            code = self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the job does not end; it wrote:\n{self.output[-4000:]}", pytrace=False)
        self._reader.join(SECONDS)
        return Ended(code, self.output)

    def family(self) -> list[psutil.Process]:
        """All processes below the started one."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def workers(self) -> list[psutil.Process]:
        """The ranks, as far as they are there, in the order of their start."""
        ranks: list[psutil.Process] = []
        for it in self.family():
            # One that ends while it is looked at is not there; a zombie's error is one of these.
            with contextlib.suppress(psutil.NoSuchProcess):
                command = it.cmdline()
                # torchrun's own command line names the module too.
                if "gdpo_megatron.worker" in command and "gdpo_megatron.agent" not in command:
                    ranks.append(it)
        return ranks


@contextlib.contextmanager
def running(command: Sequence[str], **environment: str) -> Iterator[RunningJob]:
    """Start a command; when the block is left, nothing of it runs on."""
    job = RunningJob(command, environment)
    try:
        yield job
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*job.family(), job.process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        job.process.wait()


def cli(*arguments: str | Path) -> list[str]:
    """The command line of `gdpo-megatron`."""
    return [sys.executable, "-m", "gdpo_megatron.cli", *map(str, arguments)]


def run_job(*arguments: str | Path) -> Ended:
    """Run a `gdpo-megatron` command to its end."""
    with running(cli(*arguments)) as job:
        return job.wait()


def succeed(*arguments: str | Path) -> str:
    """Run a command that must succeed; returns its output."""
    ended = run_job(*arguments)
    if ended.code != 0:
        pytest.fail(f"exit code {ended.code}:\n{ended.output[-4000:]}", pytrace=False)
    return ended.output


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
