"""What torchrun starts on every rank: `python -m gdpo_megatron.worker JOB CONFIG [overrides]`.

The launcher has validated the config; a worker only builds and runs.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gdpo_megatron.config.loader import load_config
from gdpo_megatron.config.schema import RLConfig, SFTConfig
from gdpo_megatron.platform import detect_platform


def _train(config: RLConfig, base_dir: Path, parts: Any) -> None:
    from gdpo_megatron.trainer import GDPOTrainer

    GDPOTrainer(config, base_dir, parts).run()


def _sft(config: SFTConfig, base_dir: Path, parts: Any) -> None:
    from gdpo_megatron.sft import run_sft

    run_sft(config, base_dir, parts)


def _eval(config: RLConfig, base_dir: Path, parts: Any) -> None:
    from gdpo_megatron.evaluate import run_eval

    result = run_eval(config, base_dir, parts)
    if parts.mesh.rank == 0:
        print(json.dumps(result.as_json()), flush=True)


Job = Callable[[Any, Path, Any], None]
JOBS: dict[str, tuple[type[RLConfig] | type[SFTConfig], Job]] = {
    "train": (RLConfig, _train),
    "sft": (SFTConfig, _sft),
    "eval": (RLConfig, _eval),
}


def main(arguments: list[str]) -> None:
    """Run one rank of a job."""
    job, config_path, *overrides = arguments
    # Megatron warns of each optional package that is absent, on every rank.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", message=".*will be renamed.*|.*deprecated.*")
    root, run = JOBS[job]
    config = load_config(root, Path(config_path), overrides)
    base_dir = Path(config_path).resolve().parent
    platform = detect_platform()
    platform.prepare_megatron()

    import torch.distributed as dist

    from gdpo_megatron.build import build_parts

    parts = build_parts(
        platform,
        base_dir,
        model=config.model,
        parallel=config.parallel,
        precision=config.precision,
        seed=config.seed,
    )
    run(config, base_dir, parts)
    # Leaving while a peer still talks would look like a crash to it.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
