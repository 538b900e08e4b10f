"""Arguments of `gdpo-megatron certify`, apart from what needs torch: --help has no use for it."""

from __future__ import annotations

import argparse
from pathlib import Path

from gdpo_megatron.checkpoint_cli import positive

CERTIFY_SUMMARY = "prove this machine in minutes: every check for real, one after the other"


def add_certify(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `certify`."""
    devices = command.add_mutually_exclusive_group(required=True)
    devices.add_argument("--gpus", type=positive, metavar="N", help="GPUs of this node to use")
    devices.add_argument(
        "--processes", type=positive, metavar="N", help="ranks on a machine without a GPU"
    )
    command.add_argument(
        "--only", nargs="+", default=[], metavar="CHECK", help="by name; default: all"
    )
    command.add_argument("--model", type=Path, metavar="FOLDER", help="for check model_run")
    command.add_argument(
        "--data", type=Path, metavar="FILE", help="its rows, as `data prepare gsm8k` writes them"
    )
    command.add_argument(
        "--time-limit",
        type=positive,
        metavar="SECONDS",
        help="of each check (15 minutes, of runs 30, of model_run 60)",
    )
    command.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="new folder for certificate.json and each check's log (runs/certify_DATE_TIME)",
    )
    command.add_argument(
        "--json", type=Path, metavar="FILE", help="write the certificate there too"
    )
