"""`gdpo-megatron convert` and `verify`, and the tools of the same names.

Exit codes: 0 done, 1 a folder is not what it should be, 2 bad input (one line each), 130
interrupted; an interrupted conversion goes on when it is run again.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gdpo_megatron.errors import InputError
from gdpo_megatron.launch import INTERRUPTED

CONVERT_SUMMARY = "model folders from Hugging Face to Megatron, back, or within a format"
VERIFY_SUMMARY = "files, tensors and logits of a model folder"

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}


# ---- convert -------------------------------------------------------------------------------------


def add_convert(command: argparse.ArgumentParser, to: str | None = None) -> None:
    """Give a parser the arguments of `convert`; with `to`, the format is settled."""
    command.add_argument("source", metavar="SRC", help="model folder; a run's checkpoint is one")
    command.add_argument("target", metavar="DST", help="new folder; appears when it is whole")
    if to is None:
        command.add_argument("--to", choices=("hf", "megatron"), required=True, help="its format")
    else:
        command.set_defaults(to=to)
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the new weights (the source's)",
    )
    command.add_argument(
        "--max-shard-size",
        type=_size,
        default="5GiB",
        metavar="SIZE",
        help="of one file, e.g. 500MB (%(default)s)",
    )
    command.add_argument(
        "--overwrite", action="store_true", help="replace DST, a model folder, when done"
    )
    command.add_argument(
        "--hf-files",
        metavar="FOLDER",
        help="config.json and tokenizer for a Megatron checkpoint that carries none",
    )


def run_convert(options: argparse.Namespace) -> int:
    """Convert; returns the exit code."""
    from gdpo_megatron.conversion.convert import convert

    source, target = Path(options.source), Path(options.target)
    if not source.is_dir():
        raise InputError(f"no folder {source}")
    progress = _ShownProgress(f"gdpo-megatron convert: {target}")
    try:
        with progress.display:
            done = convert(
                source,
                target,
                to=options.to,
                dtype=options.dtype,
                shard_bytes=options.max_shard_size,
                overwrite=options.overwrite,
                hf_files=Path(options.hf_files) if options.hf_files else None,
                progress=progress,
            )
            progress.finish()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return INTERRUPTED
    finally:
        for text in progress.messages:
            print(f"gdpo-megatron: {text}", file=sys.stderr)
    size = sum(entry["size"] for entry in done.manifest["files"].values())
    about = f"{done.manifest['num_parameters']:,} parameters of {done.arch.family}"
    print(f"{target}: {about}, {done.manifest['dtype']}, {size:,} bytes")
    return 0


class _ShownProgress:
    """A conversion's progress on the screen: files, and megabytes over all of them."""

    def __init__(self, title: str):
        from gdpo_megatron.observability.progress import ProgressDisplay

        # How many files there are is known when the source has been read.
        self.display = ProgressDisplay(1, 0, title, unit="file")
        self.messages: list[str] = []
        self._file, self._num_files, self._done, self._total = "", 0, 0, 0

    def begin(self, num_bytes: int, num_files: int) -> None:
        self._total = num_bytes
        self.display.set_total(num_files)

    def advance(self, file: str, num_bytes: int) -> None:
        if file != self._file:
            self.finish()
            self._file = file
            self.display.phase(file)
        self._done += num_bytes
        self.display.progress(self._done // 10**6, self._total // 10**6)

    def finish(self) -> None:
        """The current file is done."""
        if self._file:
            self._num_files += 1
            self.display.step_done(self._num_files, {"GB": self._done / 1e9})
            self._file = ""

    def message(self, text: str) -> None:
        self.messages.append(text)


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Za-z]*)", text)
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no size; write 500MB, 5GiB or bytes")
    return size


# ---- verify --------------------------------------------------------------------------------------


def add_verify(command: argparse.ArgumentParser) -> None:
    """Give a parser the arguments of `verify`."""
    command.add_argument("folder", metavar="FOLDER", help="model folder of either format")
    command.add_argument("other", metavar="OTHER", nargs="?", help="one that should be the same")
    command.add_argument(
        "--prompt", action="append", default=[], help="text to compare on; repeatable"
    )
    command.add_argument(
        "--num-prompts", type=positive, default=2, help="random ones without --prompt (%(default)s)"
    )
    command.add_argument(
        "--length", type=positive, default=64, help="tokens of a random prompt (%(default)s)"
    )
    command.add_argument("--seed", type=int, default=0, help="of random prompts (%(default)s)")
    command.add_argument(
        "--tolerance-factor",
        type=float,
        default=1.0,
        metavar="X",
        help="logits may differ by X * max(1, |logit|) * (2e-6, or 4 times the rounding of "
        "transformers itself where that is more) (%(default)s)",
    )
    command.add_argument(
        "--no-logits", action="store_true", help="files and tensors only; needs little memory"
    )


def run_verify(options: argparse.Namespace) -> int:
    """Check and compare; returns the exit code."""
    from gdpo_megatron import layer_values, verify
    from gdpo_megatron.conversion.model_folder import is_megatron

    if not options.tolerance_factor > 0:
        raise InputError(f"--tolerance-factor is {options.tolerance_factor}; needs to be above 0")
    folders = [Path(name) for name in (options.folder, options.other) if name is not None]
    good = all([_files_are_whole(folder) for folder in folders])
    opened = [layer_values.open_model(folder) for folder in folders]
    for folder, (arch, checkpoint) in zip(folders, opened, strict=True):
        print(f"{folder}: {len(checkpoint.dtypes):,} tensors as config.json has them")
        for name, count in verify.non_finite_tensors(checkpoint, arch).items():
            print(f"warning: {folder}: {name}: {count:,} values are not finite")
    arch, checkpoint = opened[0]
    if options.other is not None:
        good = _tensors_are_equal(opened) and good
    if options.no_logits:
        return 0 if good else 1
    prompts = layer_values.read_prompts(
        folders[0],
        arch,
        options.prompt,
        num_prompts=options.num_prompts,
        length=min(options.length, arch.max_position_embeddings),
        seed=options.seed,
    )
    warnings.filterwarnings("ignore", module=r"megatron\.core")  # that it runs without TE
    reference = next((folder for folder in folders if not is_megatron(folder)), None)
    rows = verify.compare_with_transformers(
        folders[0], checkpoint, arch, prompts, reference=reference
    )
    limit = rows[-1].allowed(options.tolerance_factor)
    num_tokens = sum(map(len, prompts))
    print(f"Megatron and transformers in float32, {num_tokens:,} tokens, largest over all of them;")
    print("rounding is transformers against itself in float64, also relative to max(1, |value|):")
    print(*layer_values.table_lines(rows), sep="\n")
    within = rows[-1].relative <= limit
    verdict = "within" if within else "MORE THAN"
    print(f"logits: {rows[-1].relative:.2e} relative to max(1, |logit|), {verdict} {limit:.2e}")
    return 0 if good and within else 1


def _files_are_whole(folder: Path) -> bool:
    from gdpo_megatron.conversion.output_folder import manifest_problems

    problems = manifest_problems(folder)
    if problems is None:
        print(f"{folder}: no manifest.json, nothing says what its files should be")
        return True
    for problem in problems:
        print(f"{folder}: {problem}")
    if not problems:
        print(f"{folder}: all files as manifest.json has them")
    return not problems


def _tensors_are_equal(opened: Sequence[tuple[Any, Any]]) -> bool:
    from gdpo_megatron import verify

    (arch, one), (other_arch, other) = opened
    if arch != other_arch:
        print("the models have different configs")
        return False
    lines = verify.different_tensors(one, other, arch)
    for line in lines:
        print(line)
    total = len(one.dtypes)
    print(f"{total - len(lines):,} of {total:,} tensors are bit-identical")
    return not lines


def positive(text: str) -> int:
    """A number of things on the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no positive integer")
    return int(text)


# ---- the tools -----------------------------------------------------------------------------------


def run_tool(
    description: str,
    add: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int],
    arguments: Sequence[str] | None = None,
) -> None:
    """Be a program of its own; ends the process."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    add(parser)
    options = parser.parse_args(arguments)
    try:
        sys.exit(run(options))
    except InputError as error:
        for problem in error.problems:
            print(f"{parser.prog}: {problem}", file=sys.stderr)
        sys.exit(2)
