"""What torchrun starts on every rank: `python -m gdpo_megatron.worker JOB CONFIG [overrides]`.

The launcher has validated the config; a worker only builds and runs. What takes long to import is
imported late: until the signals are noted, a Ctrl-C finds nobody who would listen.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdpo_megatron.interrupt import note_signals
from gdpo_megatron.processes import LAUNCHER, die_with_parent

if TYPE_CHECKING:
    from gdpo_megatron.config.schema import RLConfig, SFTConfig


def _train(config: RLConfig, base_dir: Path, parts: Any) -> None:
    from gdpo_megatron.trainer import GDPOTrainer

    GDPOTrainer(config, base_dir, parts).run()


def _sft(config: SFTConfig, base_dir: Path, parts: Any) -> None:
    from gdpo_megatron.sft import run_sft

    run_sft(config, base_dir, parts)


def _eval(config: RLConfig, base_dir: Path, parts: Any) -> None:
    from gdpo_megatron.evaluation.job import run_eval

    run_eval(config, base_dir, parts)


JOBS: dict[str, Callable[[Any, Path, Any], None]] = {"train": _train, "sft": _sft, "eval": _eval}


def leave_out_warnings() -> None:
    """Leave out what Megatron warns of on every rank: each optional package that is absent."""
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", message=".*will be renamed.*|.*deprecat.*")


def main(arguments: list[str]) -> None:
    """Run one rank of a job."""
    job, config_path, *overrides = arguments
    note_signals()

    launcher = os.environ.get(LAUNCHER)
    die_with_parent(signal.SIGKILL, int(launcher) if launcher else None)

    from gdpo_megatron.config.loader import load_config
    from gdpo_megatron.config.schema import RLConfig, SFTConfig
    from gdpo_megatron.platform import detect_platform

    # The launcher has told of rows that are left out, once and not on every rank.
    logging.getLogger("gdpo_megatron.data").setLevel(logging.ERROR)
    leave_out_warnings()
    root = SFTConfig if job == "sft" else RLConfig
    config = load_config(root, Path(config_path), overrides)
    base_dir = Path(config_path).resolve().parent
    platform = detect_platform()
    platform.prepare_megatron()

    import torch.distributed as dist

    from gdpo_megatron.build import build_parts
    from gdpo_megatron.distributed.mesh import join

    join(platform, config.launch)
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1 and config.launch.health_check:
        from gdpo_megatron.nodes.network import check_ranks, state_bytes

        needed = state_bytes(job, config, base_dir, dist.get_world_size())
        report = check_ranks(platform, config.launch, needed)
        if dist.get_rank() == 0:
            print(*report, sep="\n", flush=True)
    parts = build_parts(
        platform,
        base_dir,
        model=config.model,
        parallel=config.parallel,
        precision=config.precision,
        memory=config.memory,
        seed=config.seed,
        launch=config.launch,
    )
    JOBS[job](config, base_dir, parts)
    # Leaving while a peer still talks would look like a crash to it.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    import faulthandler

    from gdpo_megatron.errors import InputError
    from gdpo_megatron.nodes.failures import SAID, record

    faulthandler.enable()
    try:
        main(sys.argv[1:])
    except InputError as error:
        # What only a worker can see, such as a checkpoint that does not fit: no traceback either.
        if not record(error, error.problems) and os.environ.get("RANK", "0") == "0":
            for problem in error.problems:
                print(f"gdpo-megatron: {problem}", file=sys.stderr, flush=True)
        sys.exit(SAID)
    except Exception as error:
        # The launcher shows it, and that of the rank that failed first before the others.
        if not record(error):
            raise
        sys.exit(1)
