"""Which layouts of a config fit its world: the search, and what is nearest where none does.

Searched are TP within a node, PP with equal and with evened-out stages, EP and the experts' TP, the
engine's TP within a node and over several, and how many sequences an engine has room for. All else
is the config's: what a GPU computes at a time, what is recomputed, where the reference is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from gdpo_megatron.config.schema import ParallelConfig, RLConfig
from gdpo_megatron.config.vllm import VllmConfig
from gdpo_megatron.planning.job import Job, job_problems
from gdpo_megatron.planning.machine import Assumptions, Gpu, usable_bytes
from gdpo_megatron.planning.memory import (
    engine_rows,
    kv_bytes_per_token,
    kv_cache_bytes,
    memory_plan,
)
from gdpo_megatron.planning.plan import Plan, make_plan
from gdpo_megatron.planning.step_time import head_layers, time_plan

_CACHE_STEP = 2**30
"""vLLM's cache is planned in whole GiB."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a search came to.

    Args:
        fitting: layouts that fit, the fastest first.
        nearest: that which lacks the least memory; None where no layout fits the world's ranks.
    """

    fitting: list[Plan]
    nearest: Plan | None


def layouts_that_fit(
    job: Job, gpu: Gpu, gpus_per_node: int, given: Assumptions, *, at_most: int = 10
) -> list[Plan]:
    """Layouts of the same config in the same world that fit, the fastest first."""
    return search(job, gpu, gpus_per_node, given).fitting[:at_most]


def search(job: Job, gpu: Gpu, gpus_per_node: int, given: Assumptions) -> Found:
    """Plan every layout of the same config in the same world.

    An engine's cache is made as large as its GPUs have room for, at most what its completions of a
    step need, and not below one sequence of the greatest length.
    """
    limit = usable_bytes(gpu, given)
    fitting: list[Plan] = []
    nearest: tuple[float, Job] | None = None
    for trainer in _trainers(job, gpus_per_node):
        for other in _engines(trainer, gpus_per_node):
            other = _with_cache(other, limit)
            memory = memory_plan(other)
            if memory.peak_bytes <= limit:
                time = time_plan(other, gpu, gpus_per_node, given)
                fitting.append(Plan(other, memory, time, limit))
                continue
            if nearest is None or memory.peak_bytes < nearest[0]:
                nearest = memory.peak_bytes, other
            if memory.peak_phase == "update":
                break  # which no engine changes
    fitting.sort(key=lambda plan: plan.time.seconds)
    where = (gpu, gpus_per_node, given)
    return Found(fitting, None if nearest is None else make_plan(nearest[1], *where))


def _trainers(job: Job, gpus_per_node: int) -> Iterator[Job]:
    moe = job.arch.moe
    for tp in _divisors(min(gpus_per_node, job.world_size)):
        for pp in _divisors(job.world_size // tp):
            if pp > job.arch.num_layers:
                continue
            for ep in _divisors(moe.num_experts) if moe else [1]:
                shared = {1, tp} if moe and ep > 1 else {tp if moe else 1}
                for etp in sorted(shared):
                    parallel = replace(
                        job.config.parallel,
                        tensor_model_parallel_size=tp,
                        pipeline_model_parallel_size=pp,
                        virtual_pipeline_model_parallel_size=1,
                        pipeline_model_parallel_layout=None,
                        sequence_parallel=tp > 1,
                        expert_model_parallel_size=ep,
                        expert_tensor_parallel_size=etp,
                    )
                    yield from _with_stages(job, parallel)


def _with_stages(job: Job, parallel: ParallelConfig) -> Iterator[Job]:
    """With layers spread evenly, and with fewer on the last stage, which has the head."""
    other = _changed(job, parallel=parallel)
    config = other.config
    if isinstance(config, RLConfig):  # the engine's size comes later
        other = _changed(other, rollout=replace(config.rollout, tensor_parallel_size=1))
    if job_problems(other) or other.dp > other.rows_per_update:
        return
    yield other
    layout = evened_out(other)
    if layout is not None:
        yield _changed(other, parallel=replace(parallel, pipeline_model_parallel_layout=layout))


def evened_out(job: Job) -> str | None:
    """Megatron's notation for stages of equal work, the head counted; None where it is the same.

    The last stage gets as many layers less as the head is worth, at least one.
    """
    pp, layers = job.pp, job.arch.num_layers
    if pp == 1:
        return None
    best = min(
        range(1, layers - pp + 2),
        key=lambda last: (max(-(-(layers - last) // (pp - 1)), last + head_layers(job)), -last),
    )
    each, more = divmod(layers - best, pp - 1)
    # The first stage holds most micro-batches, and the embedding: longer ones come after it.
    stages = [each + (stage >= pp - 1 - more) for stage in range(pp - 1)] + [best]
    if stages == job.stage_layers:
        return None
    return "E" + "|".join(f"t*{count}" for count in stages) + "L"


def _changed(job: Job, **sections: object) -> Job:
    return replace(job, config=replace(job.config, **sections))  # pyright: ignore[reportArgumentType]


def _engines(job: Job, gpus_per_node: int) -> Iterator[Job]:
    config = job.config
    if not isinstance(config, RLConfig):
        yield job
        return
    most = max(gpus_per_node, job.arch.num_attention_heads)
    for size in _divisors(job.world_size):
        whole_nodes = size <= gpus_per_node or size % gpus_per_node == 0
        if size > most or not whole_nodes:
            continue
        other = _changed(job, rollout=replace(config.rollout, tensor_parallel_size=size))
        if not job_problems(other):
            yield other


def _with_cache(job: Job, limit: float) -> Job:
    """With an engine's cache of the size that there is room for."""
    config = job.config
    if not isinstance(config, RLConfig):
        return job
    rollout = config.rollout
    of_token = kv_bytes_per_token(job, rollout.tensor_parallel_size)
    of_row = config.model.max_sequence_length * of_token
    others = sum(memory_plan(job).phases["rollout"].values()) - kv_cache_bytes(job, config)
    room = int(limit) - others
    if rollout.engine == "vllm":
        needed = min(rollout.max_concurrent_sequences, engine_rows(job, config)) * of_row
        steps = min(room // _CACHE_STEP, -(-needed // _CACHE_STEP))
        steps = max(steps, -(-of_row // _CACHE_STEP))
        vllm = replace(rollout.vllm or VllmConfig(), kv_cache_gib=float(steps))
        return _changed(job, rollout=replace(rollout, vllm=vllm))
    rows = max(1, min(rollout.max_concurrent_sequences, room // of_row))
    return _changed(job, rollout=replace(rollout, max_concurrent_sequences=rows))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
