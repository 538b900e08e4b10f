"""The command: a config in, a table of what a run of it would be out, or what is wrong with it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gdpo_megatron.config.loader import load_config
from gdpo_megatron.config.schema import RLConfig, SFTConfig
from gdpo_megatron.errors import InputError, did_you_mean
from gdpo_megatron.planning.job import load_either
from gdpo_megatron.platform.gpus import GPUS
from gdpo_megatron.validate import validate
from gdpo_megatron.validation_report.commands import command_lines
from gdpo_megatron.validation_report.layout import (
    batch_section,
    engine_section,
    layout_section,
    model_section,
)
from gdpo_megatron.validation_report.machine import disk_section, port_section, precision_section
from gdpo_megatron.validation_report.reward_samples import rewards_section
from gdpo_megatron.validation_report.rows import data_section
from gdpo_megatron.validation_report.situation import Section, Situation, World

_WIDTH = 12

_SECTIONS: tuple[tuple[tuple[str, ...], Callable[[Situation], Section]], ...] = (
    (("train", "sft", "eval"), model_section),
    (("train", "sft", "eval"), data_section),
    (("train", "eval"), rewards_section),
    (("train", "sft", "eval"), layout_section),
    (("train", "eval"), engine_section),
    (("train", "sft"), batch_section),
    (("train", "sft", "eval"), precision_section),
    (("train", "sft", "eval"), port_section),
    (("train", "sft", "eval"), disk_section),
)
"""Which jobs have it, and what makes it."""


def run_validate(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Do what `validate` was asked for; returns the exit code.

    Raises:
        InputError: all that is wrong with the job.
    """
    path, world = Path(options.config), _world(options)
    if not path.is_file():
        raise InputError(f"no config file {path}")
    job, config = _load(options.job, path, overrides)
    base_dir = path.resolve().parent
    try:
        found = validate(job, config, base_dir, world.size, elsewhere=world.elsewhere)
    except InputError as error:
        if options.job is None and _may_be_for_eval(config):
            hint = "it has evaluation sets: --job eval looks at it as a config of `eval`"
            raise InputError([*error.problems, hint]) from error
        raise
    situation = Situation(
        job=job,
        path=path,
        overrides=overrides,
        config=config,
        base_dir=base_dir,
        world=world,
        found=found,
    )
    sections = [make(situation) for jobs, make in _SECTIONS if job in jobs]
    for line in _lines(situation, sections):
        print(line)
    problems = [problem for section in sections for problem in section.problems]
    if problems:
        raise InputError(problems)
    for section in command_lines(situation):
        print(f"\n{section.name}:")
        print("\n".join(f"  {line}" for line in section.lines))
    return 0


def _load(
    job: str | None, path: Path, overrides: Sequence[str]
) -> tuple[str, RLConfig | SFTConfig]:
    if job is None:
        config = load_either(path, overrides)
        return ("train" if isinstance(config, RLConfig) else "sft"), config
    return job, load_config(SFTConfig if job == "sft" else RLConfig, path, overrides)


def _may_be_for_eval(config: RLConfig | SFTConfig) -> bool:
    if not isinstance(config, RLConfig) or config.data.train is not None:
        return False
    return bool(config.eval.sets) or config.data.eval is not None


def _world(options: argparse.Namespace) -> World:
    if options.gpu is not None and options.gpu not in GPUS:
        raise InputError(f"--gpu: no '{options.gpu}'; {did_you_mean(options.gpu, GPUS)}")
    world = World(
        size=options.world_size,
        gpus_per_node=options.gpus_per_node,
        gpu_name=options.gpu,
        gpu=None if options.gpu is None else GPUS[options.gpu],
        port=options.rdzv_port,
    )
    problems = world.problems()
    if problems:
        raise InputError(problems)
    return world


def _lines(it: Situation, sections: Sequence[Section]) -> Iterator[str]:
    yield f"{'job':{_WIDTH}}{it.job} of {it.path}"
    for section in sections:
        for number, line in enumerate(section.lines):
            yield f"{'' if number else section.name:{_WIDTH}}{line}"
