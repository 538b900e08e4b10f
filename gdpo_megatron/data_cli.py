"""`gdpo-megatron data prepare`, `data formats` and `data check`.

Exit codes: 0 done, 1 `check` has found something, 2 bad input (one line each) or no row left.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from gdpo_megatron.checkpoint_cli import positive
from gdpo_megatron.data.prepare import Prepared, PrepareOptions, prepare

SUMMARY = "data sets to the project's schema, and checks of it"


def add_data(command: argparse.ArgumentParser) -> None:
    """Give a parser the arguments of `data`."""
    jobs = command.add_subparsers(dest="data_job", required=True, metavar="JOB")
    for name, (summary, add, _) in _JOBS.items():
        description = f"{summary[0].upper()}{summary[1:]}."
        add(jobs.add_parser(name, help=summary, description=description, allow_abbrev=False))


def run_data(options: argparse.Namespace) -> int:
    """Do the job; returns the exit code."""
    return _JOBS[options.data_job][2](options)


# ---- prepare -------------------------------------------------------------------------------------


def _add_prepare(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "format", metavar="FORMAT", help="one of `data formats`, or ./file.py:function"
    )
    command.add_argument(
        "inputs", metavar="INPUT", nargs="+", type=Path, help=".jsonl or .parquet files"
    )
    command.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FILE.jsonl",
        help="rows; beside it FILE.rejected.jsonl and FILE.manifest.json",
    )
    command.add_argument("--overwrite", action="store_true", help="replace these files")
    command.add_argument("--source", help="name of the data set, in each row (the format's name)")
    command.add_argument(
        "--rewards",
        type=_names,
        metavar="NAME,NAME",
        help="the config's rewards that apply to these rows (all)",
    )
    command.add_argument(
        "--check-answers",
        metavar="TYPE",
        help="type of the reward that must be able to read the answers (the format's)",
    )
    command.add_argument("--limit", type=positive, help="write the first so many good rows")
    _add_prompt_options(command)
    _add_overlap_options(command)


def _add_prompt_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--prompt-key", metavar="FIELD", help="of the prompt; format rows only")
    command.add_argument("--answer-key", metavar="FIELD", help="of the answer; format rows only")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        type=_assignment,
        metavar="NAME=VALUE",
        help="argument of the format's function; repeatable",
    )
    command.add_argument(
        "--prompt-template", metavar="TEXT", help="around a text prompt: 'Q: {prompt} A:'"
    )
    command.add_argument("--system-prompt", metavar="TEXT", help="makes a text prompt a chat")
    command.add_argument(
        "--chat", action="store_true", help="makes a text prompt a chat of one user message"
    )
    command.add_argument("--tokenizer", metavar="FOLDER", help="of the model, to count tokens")
    command.add_argument(
        "--max-prompt-tokens", type=positive, metavar="N", help="set longer prompts aside"
    )


def _add_overlap_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--keep-duplicates", action="store_true", help="keep prompts that were there before"
    )
    command.add_argument(
        "--against",
        action="extend",
        nargs="+",
        default=[],
        type=Path,
        metavar="FILE",
        help="prepared evaluation sets; rows that are in them are set aside",
    )
    command.add_argument(
        "--ngram-words", type=positive, default=13, help="words of an n-gram (%(default)s)"
    )
    command.add_argument(
        "--leak-share",
        type=float,
        default=0.5,
        metavar="X",
        help="so many of the n-grams of the shorter text in the other is a leak (%(default)s)",
    )
    command.add_argument("--allow-leaks", action="store_true", help="keep and list leaks")


def _run_prepare(options: argparse.Namespace) -> int:
    from gdpo_megatron.data.tokenizer import load_tokenizer

    tokenizer = None if options.tokenizer is None else load_tokenizer(options.tokenizer)
    keys = {"prompt_key": options.prompt_key, "answer_key": options.answer_key}
    arguments = {name: value for name, value in keys.items() if value is not None}
    settings = PrepareOptions(
        format=options.format,
        inputs=tuple(options.inputs),
        output=options.output,
        format_args={**arguments, **dict(options.set)},
        check_answers=options.check_answers,
        source=options.source,
        rewards=options.rewards,
        prompt_template=options.prompt_template,
        system_prompt=options.system_prompt,
        chat=options.chat,
        max_prompt_tokens=options.max_prompt_tokens,
        against=tuple(options.against),
        ngram_words=options.ngram_words,
        leak_share=options.leak_share,
        allow_leaks=options.allow_leaks,
        keep_duplicates=options.keep_duplicates,
        limit=options.limit,
        overwrite=options.overwrite,
    )
    progress = _ShownProgress(len(settings.inputs))
    with progress.display:
        prepared = prepare(settings, tokenizer, progress=progress)
    print(summary_table(prepared))
    return 0


class _ShownProgress:
    """Files, and how much of the current one is read."""

    def __init__(self, num_files: int):
        from gdpo_megatron.observability.progress import ProgressDisplay

        self.display = ProgressDisplay(num_files, 0, "gdpo-megatron data prepare", unit="file")
        self._num_done = 0
        self._file: Path | None = None

    def advance(self, path: Path, done: int, total: int) -> None:
        if path != self._file:
            self._file = path
            self.display.phase(path.name)
        self.display.progress(done, total)

    def file_done(self, path: Path) -> None:
        self._num_done += 1
        self.display.step_done(self._num_done, {})


def summary_table(prepared: Prepared) -> str:
    """Rows in, out and set aside, by file and reason."""
    manifest = prepared.manifest
    reasons = list(manifest["set_aside"])
    header = ["file", "rows", "written", *reasons]
    lines = [
        [
            source["file"],
            source["num_rows"],
            source["num_written"],
            *(source["set_aside"].get(reason, 0) for reason in reasons),
        ]
        for source in manifest["inputs"]
    ]
    if len(lines) > 1:
        counts = manifest["set_aside"]
        total = [manifest["num_rows"], manifest["num_written"], *counts.values()]
        lines.append(["all", *total])
    cells = [header, *([line[0], *(f"{count:,}" for count in line[1:])] for line in lines)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    table = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    notes = [f"{prepared.output}: {manifest['num_written']:,} rows"]
    if manifest["num_set_aside"]:
        notes.append(f"{prepared.rejected}: {manifest['num_set_aside']:,} rows set aside")
    if manifest["num_repaired"]:
        notes.append(f"{manifest['num_repaired']:,} rows are repaired; see their field 'repaired'")
    if manifest.get("allowed_leaks"):
        notes.append(
            f"{len(manifest['allowed_leaks']):,} rows that are in evaluation sets are kept; "
            f"{prepared.manifest_path} lists them"
        )
    return "\n".join([*table, *notes])


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"'{text}' is no list of different names: correct,length")
    return names


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"'{text}' is no NAME=VALUE")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"'{text}': {value!r} is no YAML value") from error


# ---- formats -------------------------------------------------------------------------------------


def _add_formats(command: argparse.ArgumentParser) -> None:
    pass


def _run_formats(options: argparse.Namespace) -> int:
    from gdpo_megatron.data.formats import FORMATS, Format

    names = FORMATS.names()
    for name in names:
        print(f"{name:<{max(map(len, names))}}  {Format.of(FORMATS.get(name)).summary}".rstrip())
    return 0


# ---- check ---------------------------------------------------------------------------------------


def _add_check(command: argparse.ArgumentParser) -> None:
    command.add_argument("files", metavar="FILE", nargs="+", type=Path, help=".jsonl or .parquet")


def _run_check(options: argparse.Namespace) -> int:
    from gdpo_megatron.data.check import check_prepared

    reports = [check_prepared(path) for path in options.files]
    for report in reports:
        print(report)
    return 0 if all(report.good for report in reports) else 1


_JOBS: dict[
    str,
    tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]],
] = {
    "prepare": (
        "data sets of a known format to one schema; what does not fit is set aside",
        _add_prepare,
        _run_prepare,
    ),
    "formats": ("the formats that prepare reads", _add_formats, _run_formats),
    "check": ("rows against the schema", _add_check, _run_check),
}
