"""The `sandbox` section: how programs that the model wrote are run, and what each run may use."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from gdpo_megatron.config.section import PositiveFloat, PositiveInt, section


@section
class SandboxConfig:
    """Where rewards run the model's programs; used by code_pass_rate and code_bug_free."""

    mode: Literal["auto", "bwrap", "inner", "unsafe"] = "auto"
    """Isolation: bwrap (namespaces around inner), inner (Landlock, seccomp, rlimits), auto (the
    first of these two that passes its probe), unsafe (none: programs run with your rights)."""

    cpu_seconds: PositiveInt = 5
    """CPU time of one run."""

    wall_seconds: PositiveFloat = 10.0
    """Wall clock of one run; above cpu_seconds, so that a busy machine fails no program."""

    memory_mb: PositiveInt = 512
    """Address space of one run in MiB, on top of the interpreter's own."""

    max_output_kb: PositiveInt = 1024
    """What one run may print, in KiB; the same again for the value that a call returns."""

    allow_numpy: bool = False
    """Let programs import numpy; it must be installed beside this package."""

    refuse_inside_verdicts: bool = False
    """Refuse tests whose verdict could only be taken inside the sandbox, by asserts that cannot be
    rewritten, where the program under test could forge it."""

    max_tasks_per_worker: PositiveInt = 5000
    """Runs after which a worker is replaced by a fresh one."""

    @model_validator(mode="after")
    def _check_times(self) -> SandboxConfig:
        if self.wall_seconds <= self.cpu_seconds:
            raise ValueError(
                f"wall_seconds {self.wall_seconds} must be above cpu_seconds {self.cpu_seconds}: "
                "else load on the machine would fail right programs"
            )
        return self
