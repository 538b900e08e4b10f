"""The commands that start the job that was looked at."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from gdpo_megatron.launch import LaunchOptions, environment, torchrun_command
from gdpo_megatron.platform.gpus import ENVIRONMENT
from gdpo_megatron.validation_report.situation import Section, Situation

FIRST_NODE = "NODE0"
"""Stands for the first node's host name."""


def command_lines(it: Situation) -> list[Section]:
    """Ours, what it starts on each node, and the one for Slurm."""
    world = it.world
    endpoint = f"{FIRST_NODE}:{world.port}" if world.num_nodes > 1 else None
    options = LaunchOptions(
        nproc=world.ranks_of_node, nnodes=world.num_nodes, rdzv_endpoint=endpoint
    )
    job = [it.job, str(it.path), *it.overrides]
    own = ["gdpo-megatron", *job, "--nproc", str(options.nproc)]
    if endpoint is not None:
        own += ["--nnodes", str(options.nnodes), "--rdzv-endpoint", endpoint]
    settings = [f"{name}={value}" for name, value in _environment(it).items()]
    torchrun = ["env", *settings, *torchrun_command(options, job)]
    slurm = ["sbatch", f"--nodes={world.num_nodes}"]
    if it.world.elsewhere:
        slurm.append(f"--gpus-per-node={options.nproc}")
    slurm += [f"--export=ALL,NPROC_PER_NODE={options.nproc}", "scripts/slurm.sbatch", *job]
    where = f" on each node ({FIRST_NODE} is the first one's name)" if endpoint else ""
    return [
        Section(f"start it{where}", [shlex.join(own)]),
        Section("what that starts (torchrun)", [shlex.join(torchrun)]),
        Section("or by Slurm", [shlex.join(slurm)]),
    ]


def _environment(it: Situation) -> Mapping[str, str]:
    """What the workers get beside what is there."""
    if it.world.elsewhere:
        return {"TOKENIZERS_PARALLELISM": "false", **ENVIRONMENT}
    return environment({})
