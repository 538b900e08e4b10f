"""`gdpo-megatron plan`: a config in, a plan or a dry run out."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from gdpo_megatron.errors import InputError
from gdpo_megatron.planning.job import Job, load_job


def run_plan(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Do what `plan` was asked for; returns the exit code."""
    job = load_job(
        Path(options.config),
        overrides,
        world_size=options.world_size,
        model_folder=options.model_config,
    )
    return _dry_run(job, options.rank, with_sums=not options.no_shard_sums)


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
