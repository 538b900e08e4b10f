"""`gdpo-megatron plan`: a config in, a plan or a dry run out."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from gdpo_megatron.errors import InputError, did_you_mean
from gdpo_megatron.planning.chart import draw
from gdpo_megatron.planning.job import Job, load_job
from gdpo_megatron.planning.machine import GPUS, Assumptions
from gdpo_megatron.planning.plan import make_plan
from gdpo_megatron.planning.search import layouts_that_fit
from gdpo_megatron.planning.tables import (
    assumption_lines,
    layout_lines,
    layout_name,
    plan_lines,
)


def run_plan(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Do what `plan` was asked for; returns the exit code: 1 where the job does not fit."""
    if options.gpu not in GPUS:
        raise InputError(f"--gpu: no '{options.gpu}'; {did_you_mean(options.gpu, GPUS)}")
    if options.chart is not None and not options.chart.parent.is_dir():
        raise InputError(f"--chart: no folder {options.chart.parent}")
    job = load_job(
        Path(options.config),
        overrides,
        world_size=options.world_size,
        model_folder=options.model_config,
        uneven_gathers=options.gpu != "cpu",
    )
    if options.dry_run:
        return _dry_run(job, options.rank, with_sums=not options.no_shard_sums)
    given = Assumptions()
    where = (GPUS[options.gpu], options.gpus_per_node, given)
    plan = make_plan(job, *where)
    lines = plan_lines(plan, options.gpu, options.gpus_per_node)
    if options.layouts:
        lines += ["", *layout_lines(layouts_that_fit(job, *where))]
    print("\n".join([*lines, "", *assumption_lines(given)]))
    if options.chart is not None:
        title = f"{Path(options.config).stem}: {layout_name(job)}, {job.world_size} x {options.gpu}"
        draw(plan, title, options.chart)
    return 0 if plan.fits else 1


def _dry_run(job: Job, rank: int, *, with_sums: bool) -> int:
    if not 0 <= rank < job.world_size:
        raise InputError(
            f"--rank is {rank}; --world-size {job.world_size} has 0 to {job.world_size - 1}"
        )
    import warnings

    # Of kernels that are not needed here, and of names that torch will change.
    for module in (r"megatron\.", r"torch\.distributed\."):
        warnings.filterwarnings("ignore", module=module)
    began, cpu = time.perf_counter(), time.process_time()
    from gdpo_megatron.planning.dry_run import dry_run, shard_sums
    from gdpo_megatron.planning.tables import rank_lines, shard_lines

    print("\n".join(rank_lines(job, dry_run(job, rank))))
    whole = True
    if with_sums:
        sums = shard_sums(job)
        whole = sums.is_whole
        print("\n" + "\n".join(shard_lines(job, sums)))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(f"\n{seconds:.0f} s, {cpu:.0f} s of them on the processor")
    return 0 if whole else 1
