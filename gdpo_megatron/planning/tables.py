"""Plans and dry runs as lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from gdpo_megatron.planning.job import Job
from gdpo_megatron.planning.machine import Assumptions
from gdpo_megatron.planning.memory import PARTS
from gdpo_megatron.planning.plan import Plan

if TYPE_CHECKING:  # which import Megatron
    from gdpo_megatron.planning.dry_run import RankRecord, ShardSums

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def in_bytes(number: float) -> str:
    """A number of bytes for a person.

    >>> in_bytes(1536)
    '1.5 KiB'
    """
    size, unit = float(number), 0
    while abs(size) >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.0f} B" if unit == 0 else f"{size:.{1 if size < 100 else 0}f} {_UNITS[unit]}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Columns of text, the first `left` ones flush left, the others right."""
    lines = [list(head), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def layout_name(job: Job) -> str:
    """A layout in a word: TP8 x PP8 x DP16."""
    sizes = {
        "TP": job.tp,
        "PP": job.pp,
        "VP": job.vp,
        "CP": job.cp,
        "EP": job.ep,
        "ETP": job.etp,
    }
    parts = [f"{name}{size}" for name, size in sizes.items() if size > 1]
    return " x ".join([*parts, f"DP{job.dp}"])


def rank_lines(job: Job, record: RankRecord) -> list[str]:
    """What a rank of a dry run holds, and what it would send."""
    place = record.place
    experts = f", ep {place.ep}, expert-tp {place.etp}" if job.arch.moe else ""
    lines = [
        f"rank {place.rank} of {job.world_size} ({layout_name(job)}): tp {place.tp}, "
        f"pp {place.pp}, dp {place.dp}, cp {place.cp}{experts}",
        f"  {record.num_parameters:,} parameters: {in_bytes(record.parameter_bytes)}, gradients "
        f"{in_bytes(record.gradient_bytes)}, optimizer {in_bytes(record.optimizer_bytes)}",
        f"  micro-batches of {record.shape[0]} x {record.shape[1]} tokens, "
        f"{record.num_microbatches} of the {record.config_microbatches} of an update were run",
    ]
    for phase in record.phases:
        lines += [
            "",
            f"{phase.name}: {in_bytes(phase.peak_bytes)} at most above "
            f"{in_bytes(phase.held_bytes)} held",
        ]
        rows = [
            (
                f"  {it.kind}",
                it.group,
                str(it.group_size),
                in_bytes(it.num_bytes),
                str(it.count),
                in_bytes(it.num_bytes * it.count),
            )
            for it in phase.traffic
        ]
        if rows:
            lines += table(("  message", "group", "ranks", "of each", "count", "in all"), rows, 2)
        else:
            lines.append("  no messages")
    return lines


def shard_lines(job: Job, sums: ShardSums) -> list[str]:
    """Whether the shards of a layout are the model."""
    text = f"shards of the {sums.num_places} places of the layout: {sums.num_parameters:,}"
    extra = [
        f"{count:,} of {what}"
        for count, what in (
            (sums.padding, "the vocabulary's padding"),
            (sums.tied_copies, "the tied embedding's second copy"),
        )
        if count
    ]
    of_model = " + ".join([f"{sums.model_parameters:,} of the model", *extra])
    lines = [f"{text} parameters {'=' if sums.is_whole else 'are not'} {of_model}"]
    return lines + [f"  {problem}" for problem in sums.problems]


def plan_lines(plan: Plan, gpu: str, gpus_per_node: int) -> list[str]:
    """A plan: memory by phase, time by phase."""
    job, memory, time = plan.job, plan.memory, plan.time
    shape, held = job.shape(), memory.held
    verdict = "fits" if plan.fits else "does not fit"
    lines = [
        f"{job.world_size} x {gpu}, {gpus_per_node} a node: {layout_name(job)}; {verdict}: "
        f"{in_bytes(memory.peak_bytes)} of {in_bytes(plan.limit_bytes)} in {memory.peak_phase}",
        f"{held.num_parameters:,} parameters on a GPU of stage {memory.pp_rank}, the fullest; "
        f"an update is {shape.num_microbatches} micro-batches of {shape.rows} x {shape.columns} "
        "tokens",
        "",
    ]
    parts = [part for part in PARTS if any(part in phase for phase in memory.phases.values())]
    rows = [
        (
            name,
            *(in_bytes(held_.get(part, 0)) if held_.get(part) else "-" for part in parts),
            in_bytes(sum(held_.values())),
        )
        for name, held_ in memory.phases.items()
    ]
    lines += table(("GPU memory", *parts, "in all"), rows)
    if memory.host_bytes:
        lines.append(
            f"host memory: {in_bytes(memory.host_bytes)} a rank for the reference, "
            f"{in_bytes(memory.host_bytes * gpus_per_node)} a node"
        )
    lines += [
        "",
        *table(
            ("time", "seconds", "share"),
            [
                (name, f"{seconds:.2f}", f"{seconds / time.seconds:.0%}")
                for name, seconds in time.phases.items()
            ]
            + [("step", f"{time.seconds:.2f}", "")],
        ),
    ]
    lines.append(
        f"{time.step_tokens / time.seconds / job.world_size:,.0f} tokens/s/GPU; training "
        f"{time.training_flops:.3g} FLOP a step, {time.utilisation:.0%} of the peak in the update; "
        f"pipeline bubble {time.bubble:.1%}"
    )
    return lines


def layout_lines(plans: Sequence[Plan]) -> list[str]:
    """Layouts that fit."""
    if not plans:
        return [
            "no layout of this config fits; lower max_tokens_per_micro_batch or "
            "micro_batch_size, set memory.*, or take more GPUs"
        ]
    rows = [
        (
            layout_name(plan.job),
            str(getattr(getattr(plan.job.config, "rollout", None), "tensor_parallel_size", "-")),
            in_bytes(plan.memory.peak_bytes),
            plan.memory.peak_phase,
            f"{plan.time.seconds:.1f}",
        )
        for plan in plans
    ]
    return table(("layout that fits", "engine TP", "memory", "in", "seconds"), rows)


def assumption_lines(given: Assumptions) -> list[str]:
    """What the time was computed with."""
    values = [f"{name} {getattr(given, name):g}" for name in given.__slots__]
    return ["assumed, not measured: " + ", ".join(values)]
