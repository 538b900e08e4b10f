"""Arguments of `gdpo-megatron plan`, apart from what needs torch: --help has no use for it."""

from __future__ import annotations

import argparse
from pathlib import Path

from gdpo_megatron.checkpoint_cli import positive

PLAN_SUMMARY = (
    "memory and time of a run before it is started; --dry-run builds any rank of its world"
)


def add_plan(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `plan`."""
    command.usage = (
        "gdpo-megatron plan CONFIG [--section.key value ...] --world-size N [--gpu NAME] ..."
    )
    command.add_argument("config", metavar="CONFIG", help="YAML file of train or sft")
    command.add_argument("--world-size", type=positive, default=1, help="GPUs, ranks in all (1)")
    command.add_argument(
        "--model-config", type=Path, metavar="FOLDER", help="of a config.json (model.hf_path's)"
    )
    command.add_argument("--gpu", default="h100-80", help="a100-80, h100-80, h200-141 or cpu")
    command.add_argument("--gpus-per-node", type=positive, default=8, help="(8)")
    command.add_argument("--layouts", action="store_true", help="list other layouts that fit")
    command.add_argument("--chart", type=Path, metavar="FILE", help="write the memory as a PNG")
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="build the real model of one rank and run one step of it, without any memory",
    )
    command.add_argument("--rank", type=int, default=0, help="of the dry run (0)")
    command.add_argument(
        "--no-shard-sums",
        action="store_true",
        help="leave out the models of all other places of the layout",
    )
