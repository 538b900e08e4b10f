"""The command line: `gdpo-megatron train|sft|eval CONFIG [--section.key value ...]`, and others.

The launcher reads and validates everything, then starts the ranks. What is the user's to mend is
printed one line per problem, exit code 2, and nothing has been written. Exit code 130 means
interrupted and saved: the same command goes on.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from gdpo_megatron import __version__, checkpoint_cli, data_cli
from gdpo_megatron.certify.arguments import CERTIFY_SUMMARY, add_certify
from gdpo_megatron.checkpoint_cli import positive
from gdpo_megatron.config.help import describe
from gdpo_megatron.config.loader import load_config
from gdpo_megatron.config.schema import RLConfig, SFTConfig
from gdpo_megatron.errors import InputError
from gdpo_megatron.launch import INTERRUPTED, LaunchOptions, run
from gdpo_megatron.planning.arguments import PLAN_SUMMARY, add_plan
from gdpo_megatron.validation_report.arguments import VALIDATE_SUMMARY, add_validate

_JOBS: dict[str, tuple[type[RLConfig] | type[SFTConfig], str]] = {
    "train": (RLConfig, "train with GDPO, or another estimator"),
    "sft": (SFTConfig, "supervised fine-tuning"),
    "eval": (RLConfig, "rewards and accuracy of a model on held-out sets"),
}
_UNITS = {"train": "step", "sft": "step", "eval": "chunk"}
"""What a job finishes when it is interrupted."""

_FILE_COMMANDS = {
    "convert": (
        checkpoint_cli.CONVERT_SUMMARY,
        checkpoint_cli.add_convert,
        checkpoint_cli.run_convert,
    ),
    "verify": (
        checkpoint_cli.VERIFY_SUMMARY,
        checkpoint_cli.add_verify,
        checkpoint_cli.run_verify,
    ),
    "data": (data_cli.SUMMARY, data_cli.add_data, data_cli.run_data),
}


class _FullHelp(argparse.HelpFormatter):
    """Keeps the config reference as it is laid out."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gdpo-megatron",
        description="RL post-training with several rewards: GDPO on Megatron-Core.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, summary) in _JOBS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            usage=f"gdpo-megatron {name} CONFIG [--section.key value ...] [--nproc N]",
            formatter_class=_FullHelp,
            allow_abbrev=False,
            add_help=False,
        )
        command.add_argument("--help", "-h", action="store_true", help="this, and every config key")
        command.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file")
        command.add_argument("--nproc", type=positive, default=1, help="ranks on this node (1)")
        command.add_argument("--nnodes", type=positive, default=1, help="nodes (1)")
        command.add_argument("--node-rank", type=int, help="number of this node, from 0")
        command.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="of the first node")
    add_plan(
        commands.add_parser(
            "plan",
            help=PLAN_SUMMARY,
            description=f"{PLAN_SUMMARY[0].upper()}{PLAN_SUMMARY[1:]}.",
            allow_abbrev=False,
        )
    )
    add_validate(
        commands.add_parser(
            "validate",
            help=VALIDATE_SUMMARY,
            description=f"{VALIDATE_SUMMARY[0].upper()}{VALIDATE_SUMMARY[1:]}.",
            allow_abbrev=False,
        )
    )
    _add_generate(commands)
    _add_doctor(commands)
    add_certify(
        commands.add_parser(
            "certify",
            help=CERTIFY_SUMMARY,
            description=f"{CERTIFY_SUMMARY[0].upper()}{CERTIFY_SUMMARY[1:]}.",
            allow_abbrev=False,
        )
    )
    for name, (summary, add, _) in _FILE_COMMANDS.items():
        description = f"{summary[0].upper()}{summary[1:]}."
        add(commands.add_parser(name, help=summary, description=description, allow_abbrev=False))
    return parser


def _add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "generate", help="text from a model", description="Complete prompts with a model."
    )
    command.add_argument("model", help="model folder: RUN_DIR/hf, RUN_DIR/checkpoints/step_N ...")
    command.add_argument("--prompt", action="append", required=True, help="may be repeated")
    command.add_argument("--tokenizer", help="tokenizer folder or .model file (of the model)")
    command.add_argument("--max-completion-tokens", type=positive, default=128)
    command.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    command.add_argument("--top-p", type=float, default=1.0)
    command.add_argument("--top-k", type=int, default=0)
    command.add_argument("--stop", action="append", default=[], help="string that ends; repeatable")
    command.add_argument("--seed", type=int, default=0)


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "doctor",
        help="what this machine has, and what to install",
        description="Try what a run may need here; exit code 1 where something needed is missing.",
    )
    command.add_argument("check", nargs="*", metavar="CHECK", help="by name; default: all")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; ends the process."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    try:
        if options.command in _JOBS:
            sys.exit(_run_job(options, rest))
        if options.command == "plan":
            from gdpo_megatron.planning.cli import run_plan  # torch takes seconds

            sys.exit(run_plan(options, rest))
        if options.command == "validate":
            from gdpo_megatron.validation_report.report import run_validate

            sys.exit(run_validate(options, rest))
        if rest:
            parser.error(f"unknown arguments: {' '.join(rest)}")
        if options.command == "generate":
            sys.exit(_generate(options))
        if options.command == "doctor":
            sys.exit(_doctor(options))
        if options.command == "certify":
            from gdpo_megatron.certify.cli import run_certify

            sys.exit(run_certify(options))
        sys.exit(_FILE_COMMANDS[options.command][2](options))
    except InputError as error:
        for problem in error.problems:
            print(f"gdpo-megatron: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)  # before any rank was started


def _doctor(options: argparse.Namespace) -> int:
    from gdpo_megatron.doctor import run_doctor

    return run_doctor(options.check)


def _run_job(options: argparse.Namespace, overrides: list[str]) -> int:
    root, summary = _JOBS[options.command]
    if options.help:
        print(_job_help(options.command, summary, root))
        return 0
    if options.config is None:
        raise InputError(f"{options.command} needs a config file; see --help")
    path = Path(options.config)
    if not path.is_file():
        raise InputError(f"no config file {path}")
    launch = _launch_options(options)
    config = load_config(root, path, overrides)
    from gdpo_megatron.run_folder import record_config
    from gdpo_megatron.validate import validate

    base_dir = path.resolve().parent
    validate(options.command, config, base_dir, launch.world_size)
    if options.command != "eval" and options.node_rank in (None, 0):
        for line in record_config(config, base_dir):
            print(line)
    return run(launch, [options.command, str(path), *overrides], unit=_UNITS[options.command])


def _launch_options(options: argparse.Namespace) -> LaunchOptions:
    problems: list[str] = []
    endpoint, node_rank, nnodes = options.rdzv_endpoint, options.node_rank, options.nnodes
    if nnodes > 1 and endpoint is None:
        problems.append("--nnodes above 1 needs --rdzv-endpoint HOST:PORT of the first node")
    if endpoint is not None and not re.fullmatch(r".+:\d+", endpoint):
        problems.append(f"--rdzv-endpoint is '{endpoint}'; needs HOST:PORT")
    if node_rank is not None and not 0 <= node_rank < nnodes:
        problems.append(f"--node-rank is {node_rank}; with --nnodes {nnodes}: 0 to {nnodes - 1}")
    if problems:
        raise InputError(problems)
    return LaunchOptions(
        nproc=options.nproc, nnodes=nnodes, node_rank=node_rank, rdzv_endpoint=endpoint
    )


def _job_help(command: str, summary: str, root: type) -> str:
    return (
        f"usage: gdpo-megatron {command} CONFIG [--section.key value ...] [--nproc N]\n"
        "         [--nnodes N --node-rank R --rdzv-endpoint HOST:PORT]\n\n"
        f"{summary[0].upper()}{summary[1:]}.\n\n"
        "CONFIG is a YAML file of the keys below; each can be given as an option as well, a\n"
        "reward by its name: --rewards.format.weight 0.5\n\n"
        "  --nproc N                  ranks on this node (1)\n"
        "  --nnodes N                 nodes (1)\n"
        "  --node-rank R              number of this node, from 0\n"
        "  --rdzv-endpoint HOST:PORT  of the first node\n\n"
        f"{describe(root)}"
    )


def _generate(options: argparse.Namespace) -> int:
    from gdpo_megatron.generate import generate_texts
    from gdpo_megatron.rollout.base import SamplingParams

    if not 0 < options.top_p <= 1 or options.top_k < 0:
        raise InputError("--top-p must be in (0, 1], --top-k not negative")
    if not 0 <= options.temperature < math.inf:
        raise InputError(f"--temperature is {options.temperature}; needs a number from 0")
    sampling = SamplingParams(
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        max_completion_tokens=options.max_completion_tokens,
        stop=tuple(options.stop),
        stop_token_ids=(),
    )
    for text in generate_texts(
        Path(options.model),
        options.prompt,
        sampling,
        options.seed,
        options.tokenizer,
        with_prompt=True,
    ):
        print(f"{text}\n")
    return 0


if __name__ == "__main__":
    main()
