"""What the machines must have: number formats, a free port, room for checkpoints."""

from __future__ import annotations

import importlib.metadata
import math
import shutil
import socket
from pathlib import Path

import torch

from gdpo_megatron.config.paths import resolve_path
from gdpo_megatron.config.schema import RLConfig
from gdpo_megatron.planning.tables import in_bytes
from gdpo_megatron.platform import detect_platform
from gdpo_megatron.platform.megatron_versions import megatron_version, shown
from gdpo_megatron.platform.vllm_versions import installed_vllm, vllm_problems
from gdpo_megatron.validation_report.situation import Section, Situation, counted

_OPTIMIZER_BYTES = 12
"""Of a trained parameter in a checkpoint: main weight and both moments, in float32. Also where the
model's own weights are in float32: a checkpoint holds both."""


def precision_section(it: Situation) -> Section:
    """Number formats against the hardware, and the versions that are installed here."""
    precision, world = it.config.precision, it.world
    fp8 = precision.fp8
    formats = f"{precision.params_dtype} parameters"
    if it.job != "eval":
        formats += ", float32 gradients and optimizer"
        if fp8 is not None:
            formats += f", FP8 products by {fp8.backend} ({fp8.recipe})"
    section = Section("precision", [formats])
    if world.gpu is not None:
        gpu, (major, minor) = world.gpu, world.gpu.capability
        section.lines.append(
            f"{world.size} x {world.gpu_name}: {gpu.memory_gb} GB, compute capability "
            f"{major}.{minor}; never executed by this project"
        )
        has_fp8 = fp8 is not None and it.job != "eval"
        section.problems += gpu.missing_for(precision.params_dtype, has_fp8)
    else:
        section.lines.append(f"this machine: {detect_platform().name}")
    versions = [f"torch {torch.__version__}", f"megatron-core {shown(megatron_version())}"]
    vllm = installed_vllm()
    if vllm is not None:
        versions.append(str(vllm))
    versions.append(f"transformers {importlib.metadata.version('transformers')}")
    section.lines.append(f"installed here: {', '.join(versions)}")
    if world.elsewhere and isinstance(it.config, RLConfig) and it.config.rollout.engine == "vllm":
        section.lines += [f"note: of this machine: {problem}" for problem in vllm_problems()]
    return section


def port_section(it: Situation) -> Section:
    """Where the nodes meet."""
    world = it.world
    section = Section("rendezvous")
    if world.num_nodes == 1:
        section.lines.append("one node: a free port is taken when it starts")
        return section
    where = f"port {world.port} of the first node"
    if world.elsewhere:
        section.lines.append(f"{where}; whether it is free is not known here")
        return section
    problem = port_problem(world.port)
    if problem is not None:
        section.problems.append(f"--rdzv-port {world.port}: {problem}; take another one")
    section.lines.append(f"{where}; free on this machine now")
    return section


def port_problem(port: int) -> str | None:
    """Why a port cannot be listened on here; None where it can."""
    if not 0 < port < 2**16:
        return "no port number"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the store does
        try:
            probe.bind(("", port))
        except OSError as error:
            return f"cannot be listened on here: {error.strerror}"
    return None


def disk_section(it: Situation) -> Section:
    """What a run leaves on the disk, against what is free there."""
    run_dir = resolve_path(it.base_dir, it.config.run_dir)
    there = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    free = shutil.disk_usage(there).free
    section = Section("disk", [f"{run_dir}: {in_bytes(free)} free"])
    if it.job == "eval":
        return section
    one, number, export = checkpoint_bytes(it), num_checkpoints(it), export_bytes(it)
    needed = one * number + export
    last = " (one of them while it is written)" if number > 1 else ""
    hf = f" + {in_bytes(export)} for the export" if export else ""
    section.lines.append(
        f"{counted(number, 'checkpoint')}{last} of {in_bytes(one)}{hf}: {in_bytes(needed)}"
    )
    own = in_use(run_dir)
    if own:
        section.lines.append(f"{in_bytes(own)} of it are there already")
    if needed - own > free:
        text = (
            f"run_dir: checkpoints and export take {in_bytes(needed)}, but {there} has "
            f"{in_bytes(free)} free"
        )
        if it.world.elsewhere:
            section.lines.append(f"note: {text}, as this machine sees it")
        else:
            section.problems.append(f"{text}; lower checkpoint.keep_last, or take another disk")
    return section


def checkpoint_bytes(it: Situation) -> int:
    """Tensors of one checkpoint: the model in params_dtype, and the optimizer's of what is trained.

    Small files (indices, random states, tokenizer) come on top.
    """
    planned = it.planned
    adapters = planned.num_adapter_parameters
    whole = planned.num_parameters + planned.num_padding_parameters + adapters
    trained = adapters if it.config.model.lora is not None else whole
    return whole * planned.dtype_bytes + trained * _OPTIMIZER_BYTES


def num_checkpoints(it: Situation) -> int:
    """The most that there are at a time: a new one is whole before an old one goes."""
    interval, steps = it.config.checkpoint.save_interval, it.config.train.num_steps
    saves = math.ceil(steps / interval) if interval else 1
    return min(saves, it.config.checkpoint.keep_last + 1)


def export_bytes(it: Situation) -> int:
    """Of <run_dir>/hf."""
    if not it.config.checkpoint.export_hf:
        return 0
    return it.planned.num_parameters * it.planned.dtype_bytes


def in_use(folder: Path) -> int:
    """Bytes of the checkpoints and the export that a run has already."""
    files = (f for name in ("checkpoints", "hf") for f in (folder / name).rglob("*"))
    return sum(f.stat().st_size for f in files if f.is_file())
