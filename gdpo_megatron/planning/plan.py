"""The plan of a job on GPUs: memory, time, whether it fits.

`plan_against_measured` puts a plan beside what a step took.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gdpo_megatron.planning.job import Job, Shape
from gdpo_megatron.planning.machine import Assumptions, Gpu, usable_bytes
from gdpo_megatron.planning.memory import MemoryPlan, memory_plan
from gdpo_megatron.planning.step_time import TimePlan, time_plan


@dataclass(frozen=True, slots=True)
class Plan:
    """A job on GPUs.

    Args:
        job: the job.
        memory: of the GPU that needs the most.
        time: of a step.
        limit_bytes: of a GPU that may be filled.
    """

    job: Job
    memory: MemoryPlan
    time: TimePlan
    limit_bytes: float

    @property
    def fits(self) -> bool:
        """Whether every phase fits."""
        return self.memory.peak_bytes <= self.limit_bytes


def make_plan(job: Job, gpu: Gpu, gpus_per_node: int, given: Assumptions) -> Plan:
    """Plan a job that fits its world."""
    time = time_plan(job, gpu, gpus_per_node, given)
    return Plan(job, memory_plan(job), time, usable_bytes(gpu, given))


def plan_against_measured(
    job: Job, measured: Mapping[str, float], pp_rank: int = 0, shape: Shape | None = None
) -> list[tuple[str, float, float, float]]:
    """What was planned for a rank beside what it measured.

    Args:
        job: the job that ran.
        measured: "parameters", "gradients", "optimizer", "activations" in bytes, any of them; see
            `measured_state`.
        pp_rank: of the rank.
        shape: of the micro-batches that were measured; None takes the longest that may come.

    Returns:
        (what, planned, measured, error as a share of the measured) of each.
    """
    from gdpo_megatron.planning.activations import update_bytes
    from gdpo_megatron.planning.state import held_by

    held = held_by(job, pp_rank)
    planned: dict[str, float] = {
        "parameters": held.parameters,
        "gradients": held.gradients,
        "optimizer": held.optimizer,
        "activations": update_bytes(job, shape or job.shape(), pp_rank).total,
    }
    return [
        (name, planned[name], value, planned[name] / value - 1 if value else 0.0)
        for name, value in measured.items()
    ]
