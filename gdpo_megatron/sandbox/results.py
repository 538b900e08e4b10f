"""What a run may use, what came of it, and the error of a machine that cannot have a sandbox."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from gdpo_megatron.config.sandbox import SandboxConfig
from gdpo_megatron.errors import InputError


class SandboxUnavailable(InputError):
    """No accepted isolation works here; each line names a layer and what to do about it."""


class Status(StrEnum):
    """How a run ended."""

    OK = "ok"
    COMPILE_ERROR = "compile_error"
    RUNTIME_ERROR = "runtime_error"
    TIMEOUT = "timeout"
    MEMORY = "memory"
    OUTPUT_LIMIT = "output_limit"
    DENIED = "denied"
    """The program failed on a system call that it may not make."""
    INFRA_ERROR = "infra_error"
    """The sandbox failed, not the program: says nothing about it."""


class NoValue:
    """Type of `NO_VALUE`."""

    def __repr__(self) -> str:
        return "NO_VALUE"


NO_VALUE: Final = NoValue()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one run may use.

    Args:
        cpu_seconds: CPU time, over all its threads.
        wall_seconds: wall clock.
        memory_bytes: address space on top of the interpreter's own.
        output_bytes: of stdout and stderr together, and again of a call's value.
    """

    cpu_seconds: int
    wall_seconds: float
    memory_bytes: int
    output_bytes: int

    @classmethod
    def of(cls, config: SandboxConfig) -> Limits:
        """The configured ones."""
        return cls(
            cpu_seconds=config.cpu_seconds,
            wall_seconds=config.wall_seconds,
            memory_bytes=config.memory_mb << 20,
            output_bytes=config.max_output_kb << 10,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """What came of a run.

    Args:
        status: how it ended.
        stdout: what it printed, at most `Limits.output_bytes`.
        stderr: the end of what it wrote there, at most 4 KiB; its traceback.
        value: what the expression of a call gave, as plain Python values; NO_VALUE otherwise.
        exit_code: of the process; negative for the signal that killed it.
        cpu_seconds: user and system time.
        wall_seconds: from the request to the process's end.
        detail: a word on what is not plain from the status.
        isolation: "bwrap", "inner" or "unsafe".
        num_attempts: runs that it took; more than one after failures of the sandbox.
    """

    status: Status
    stdout: str = ""
    stderr: str = ""
    value: Any = NO_VALUE
    exit_code: int = 0
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    detail: str = ""
    isolation: str = ""
    num_attempts: int = 1
