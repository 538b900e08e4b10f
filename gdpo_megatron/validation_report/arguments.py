"""Arguments of `gdpo-megatron validate`, apart from what needs torch: --help has no use for it."""

from __future__ import annotations

import argparse

from gdpo_megatron.checkpoint_cli import positive

VALIDATE_SUMMARY = "all that can be known of a job before it is started; starts and writes nothing"


def add_validate(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `validate`."""
    command.usage = (
        "gdpo-megatron validate CONFIG [--section.key value ...] [--world-size N] [--gpu NAME] ..."
    )
    command.add_argument("config", metavar="CONFIG", help="YAML file of train, sft or eval")
    command.add_argument(
        "--job",
        choices=("train", "sft", "eval"),
        help="what it is for (the schema that it fits: train or sft)",
    )
    command.add_argument("--world-size", type=positive, default=1, help="ranks in all (1)")
    command.add_argument(
        "--gpus-per-node", type=positive, default=8, metavar="N", help="ranks of a node (8)"
    )
    command.add_argument(
        "--gpu",
        metavar="NAME",
        help="the GPUs of other machines that it is for, e.g. h100-80 (this machine)",
    )
    command.add_argument(
        "--rdzv-port",
        type=int,
        default=29500,
        metavar="PORT",
        help="of the first node, where nodes meet (29500)",
    )
