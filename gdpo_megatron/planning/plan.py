"""The plan of a job on GPUs: memory, time, whether it fits, and which layouts would.

`plan_against_measured` puts a plan beside what a step took.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from gdpo_megatron.planning.job import Job, job_problems
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


def layouts_that_fit(
    job: Job, gpu: Gpu, gpus_per_node: int, given: Assumptions, *, at_most: int = 10
) -> list[Plan]:
    """Layouts of the same config in the same world that fit, the fastest first.

    TP within a node and with sequence parallelism, PP, EP, and the engine's TP are searched, each
    over its divisors; everything else is the config's.
    """
    fitting = [
        plan
        for other in _layouts(job, gpus_per_node)
        if (plan := make_plan(other, gpu, gpus_per_node, given)).fits
    ]
    return sorted(fitting, key=lambda plan: plan.time.seconds)[:at_most]


def _layouts(job: Job, gpus_per_node: int) -> Iterator[Job]:
    config, arch = job.config, job.arch
    experts = [1] if arch.moe is None else _divisors(arch.moe.num_experts)
    for tp in _divisors(min(gpus_per_node, job.world_size)):
        for pp in _divisors(arch.num_layers):
            for ep in experts:
                parallel = replace(
                    config.parallel,
                    tensor_model_parallel_size=tp,
                    pipeline_model_parallel_size=pp,
                    virtual_pipeline_model_parallel_size=1,
                    pipeline_model_parallel_layout=None,
                    sequence_parallel=tp > 1,
                    expert_model_parallel_size=ep,
                    expert_tensor_parallel_size=tp if arch.moe is not None and ep == 1 else 1,
                )
                for changed in _engines(replace(config, parallel=parallel), gpus_per_node):
                    other = replace(job, config=changed)
                    if not job_problems(other) and other.dp <= other.rows_per_update:
                        yield other


def _engines(config: object, gpus_per_node: int) -> Iterator[object]:
    rollout = getattr(config, "rollout", None)
    if rollout is None:
        yield config
        return
    for size in _divisors(gpus_per_node):
        yield replace(config, rollout=replace(rollout, tensor_parallel_size=size))  # pyright: ignore


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def plan_against_measured(
    job: Job, measured: Mapping[str, float], pp_rank: int = 0
) -> list[tuple[str, float, float, float]]:
    """What was planned for a rank beside what it measured.

    Args:
        job: the job that ran.
        measured: "parameters", "gradients", "optimizer", "activations" in bytes, any of them; see
            `measured_state`.
        pp_rank: of the rank.

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
        "activations": update_bytes(job, job.shape(), pp_rank).total,
    }
    return [
        (name, planned[name], value, planned[name] / value - 1 if value else 0.0)
        for name, value in measured.items()
    ]
