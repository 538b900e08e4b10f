"""The `profiling` section: which steps of a run are looked at closely, and by what."""

from __future__ import annotations

from typing import Literal

from gdpo_megatron.config.section import NonNegativeInt, PositiveInt, section


@section
class ProfilingConfig:
    """Look at some steps closely."""

    tool: Literal["torch", "nvtx"]
    """torch: torch's profiler; writes <run_dir>/profile/, traces for ui.perfetto.dev and tables of
    operations. nvtx: ranges for Nsight Systems, which has to be started around the run."""

    first_step: PositiveInt = 2
    """From this step of the run on. The first one of a start is unlike the others."""

    num_steps: PositiveInt = 1
    """So many steps, in one trace."""

    ranks: tuple[NonNegativeInt, ...] = (0,)
    """Of these ranks."""

    memory: bool = False
    """With every allocation (tool: torch)."""
