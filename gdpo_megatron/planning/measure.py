"""What a run really holds, in the plan's words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.profiler import ProfilerActivity, profile

from gdpo_megatron.planning.job import Job
from gdpo_megatron.planning.memory import memory_plan
from gdpo_megatron.planning.plan import plan_against_measured
from gdpo_megatron.planning.tables import in_bytes


def measured_state(policy: Any) -> dict[str, int]:
    """Bytes of a rank's parameters, gradients and optimizer state, asked of the tensors.

    Args:
        policy: a MegatronPolicy.

    Returns:
        "parameters" and "gradients", those of Megatron's buffers (and of parameters in none), and
        "optimizer": main weights, where parameters have fewer bits, and both moments.
    """
    buffers: list[Any] = [
        buffer for ddp in policy.ddp for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers)
    ]
    frozen = [p for it in policy.chunks for p in it.parameters() if not p.requires_grad]
    parameters = sum(it.param_data.nbytes for it in buffers if it.param_data is not None)
    main = policy.config.params_dtype.itemsize < 4
    optimizer = sum(
        parameter.numel() * (12 if main else 8)
        for group in policy.optimizer.param_groups
        for parameter in group["params"]
    )
    return {
        "parameters": parameters + sum(p.nbytes for p in frozen),
        "gradients": sum(it.grad_data.nbytes for it in buffers),
        "optimizer": optimizer,
    }


def peak_bytes(call: Callable[[], object]) -> int:
    """Largest sum of what `call` has allocated and not yet freed on the CPU at any time, in bytes.

    torch's allocator reports every tensor to its profiler, temporary ones inside kernels included.
    In a process that was forked after torch had been imported the profiler is told nothing.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    recorded: Any = profiler.profiler
    assert recorded is not None and recorded.kineto_results is not None
    events = [
        (event.start_ns(), event.nbytes())
        for event in recorded.kineto_results.events()
        if event.name() == "[memory]"
    ]
    assert events, "the profiler saw no memory: was this process forked from one that has torch?"
    live = peak = 0
    for _, num_bytes in sorted(events, key=lambda event: event[0]):
        live += num_bytes
        peak = max(peak, live)
    return peak


def first_step_lines(
    job: Job, policy: Any, memory_stats: Mapping[str, float], pp_rank: int
) -> list[str]:
    """The plan beside what a rank measured, after its first step.

    Args:
        job: what runs.
        policy: a MegatronPolicy that took a step.
        memory_stats: of the platform; the peak is compared where it is of a GPU. That of a CPU's
            process holds the interpreter and all libraries as well.
        pp_rank: of the rank.
    """
    rows = plan_against_measured(job, measured_state(policy), pp_rank)
    peak = memory_stats.get("device_peak")
    if peak:
        planned = memory_plan(job).peak_bytes
        rows.append(("peak", planned, peak, planned / peak - 1))
    return [
        f"{name}: planned {in_bytes(planned)}, measured {in_bytes(measured)} ({error:+.1%})"
        for name, planned, measured, error in rows
    ]
