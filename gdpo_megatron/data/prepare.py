"""Data sets of many formats to files of one schema, with all that does not fit set aside.

    FILE.jsonl           rows of the schema (schema.py)
    FILE.rejected.jsonl  every other row: file, line, reason, detail, and the row as it was
    FILE.manifest.json   sources with their hashes, options, counts, hashes of the two files

Each row meets the checks in the order of `Reason` and stays at the first that it fails. Rows in are
rows out plus rows set aside, always. The files appear when they are whole, the manifest last, and
depend on the inputs and options alone: no dates.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import gdpo_megatron
from gdpo_megatron.data.files import check_file, read_file
from gdpo_megatron.data.row_pipeline import PrepareOptions, RowPipeline
from gdpo_megatron.data.set_aside import SetAside, in_order, rejected_line
from gdpo_megatron.data.tokenizer import Tokenizer
from gdpo_megatron.errors import InputError

REJECTED_SUFFIX = ".rejected.jsonl"
MANIFEST_SUFFIX = ".manifest.json"


@dataclass(frozen=True, slots=True)
class Prepared:
    """What came of it: the manifest, as it was written, and where the files are."""

    manifest: Mapping[str, Any]
    output: Path
    rejected: Path
    manifest_path: Path


class Progress(Protocol):
    """Told how far the reading is."""

    def advance(self, path: Path, done: int, total: int) -> None:
        """So much of a file is read, in bytes or rows."""

    def file_done(self, path: Path) -> None:
        """All of it is."""


class _Silent:
    def advance(self, path: Path, done: int, total: int) -> None:
        pass

    def file_done(self, path: Path) -> None:
        pass


def prepare(
    options: PrepareOptions,
    tokenizer: Tokenizer | None = None,
    *,
    base_dir: Path | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Read the inputs and write the three files.

    Args:
        options: what to do.
        tokenizer: for `max_prompt_tokens`; with one, prompts are counted.
        base_dir: folder that a format's `./file.py:function` starts from.
        progress: told how far it is.

    Raises:
        InputError: a file that cannot be read, options that do not fit, output that is there
            already, or no row is left; nothing has been written then.
    """
    progress = progress or _Silent()
    _check_options(options, tokenizer)
    pipeline = RowPipeline(options, tokenizer, base_dir)
    targets = output_paths(options.output)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        output, rejected, manifest_file = (stack.enter_context(_partial(it)) for it in targets)
        sources: list[dict[str, Any]] = []
        for path, stem in zip(options.inputs, _stems(options.inputs), strict=True):
            counts = _pass_file(pipeline, path, stem, output, rejected, progress)
            progress.file_done(path)
            sources.append(_source(path, counts))
        if not pipeline.num_written:
            raise InputError(_nothing_left(sources))
        output.flush()
        rejected.flush()
        manifest = _manifest(options, tokenizer, pipeline, sources)
        manifest["output"] = {"file": targets[0].name, **_hash_of(Path(output.name))}
        manifest["rejected"] = {"file": targets[1].name, **_hash_of(Path(rejected.name))}
        text = json.dumps(manifest, indent=2, ensure_ascii=False, default=str)
        manifest_file.write(f"{text}\n".encode())
        for file, target in zip((output, rejected, manifest_file), targets, strict=True):
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(target)
    return Prepared(manifest, *targets)


def output_paths(output: Path) -> tuple[Path, Path, Path]:
    """Where rows, rejected rows and the manifest are written."""
    return output, output.with_suffix(REJECTED_SUFFIX), output.with_suffix(MANIFEST_SUFFIX)


def _pass_file(
    pipeline: RowPipeline,
    path: Path,
    stem: str,
    output: IO[bytes],
    rejected: IO[bytes],
    progress: Progress,
) -> Counter[str]:
    """Write the rows of a file here or there; returns their number by reason, or "written"."""
    counts, total = Counter[str](), _size(path)
    for raw in read_file(path):
        try:
            output.write(pipeline.row(raw, path, stem).line().encode())
            counts["written"] += 1
        except SetAside as why:
            rejected.write(rejected_line(path, raw, why))
            counts[why.reason] += 1
        progress.advance(path, raw.position, total)
    return counts


def _check_options(options: PrepareOptions, tokenizer: Tokenizer | None) -> None:
    problems: list[str] = []
    if options.max_prompt_tokens is not None and tokenizer is None:
        problems.append("--max-prompt-tokens needs --tokenizer")
    if not 0 < options.leak_share <= 1:
        problems.append(f"--leak-share is {options.leak_share}; needs to be above 0, at most 1")
    if options.allow_leaks and not options.against:
        problems.append("--allow-leaks needs --against")
    if options.output.suffix != ".jsonl":
        problems.append(f"--output is {options.output}; needs to end in .jsonl")
    targets = output_paths(options.output)
    for path in (*options.inputs, *options.against):
        try:
            check_file(path)
        except InputError as error:
            problems += error.problems
        if path.resolve() in [target.resolve() for target in targets]:
            problems.append(f"--output {options.output} would replace {path}, which is read")
    for target in targets if not options.overwrite else ():
        if target.exists():
            problems.append(f"{target} is there already; --overwrite replaces it")
    if problems:
        raise InputError(problems)


# ---- the manifest --------------------------------------------------------------------------------


def _manifest(
    options: PrepareOptions,
    tokenizer: Tokenizer | None,
    pipeline: RowPipeline,
    sources: list[dict[str, Any]],
) -> dict[str, Any]:
    """All but the files that were written."""
    totals = sum((Counter(source["set_aside"]) for source in sources), Counter[str]())
    elsewhere = ("format", "inputs", "output", "source", "against", "overwrite")
    shown = {key: value for key, value in asdict(options).items() if key not in elsewhere}
    manifest: dict[str, Any] = {
        "gdpo_megatron": gdpo_megatron.__version__,
        "format": options.format,
        "source": pipeline.source,
        "options": shown,
        "inputs": sources,
        "num_rows": sum(source["num_rows"] for source in sources),
        "num_written": pipeline.num_written,
        "num_set_aside": sum(totals.values()),
        "set_aside": in_order(totals),
        "num_repaired": pipeline.num_repaired,
    }
    if options.against:
        manifest["against"] = [{"file": str(it), **_hash_of(it)} for it in options.against]
        manifest["allowed_leaks"] = pipeline.allowed_leaks
    if tokenizer is not None:
        lengths = pipeline.prompt_lengths
        manifest["tokenizer"] = {"path": str(tokenizer.path), "vocab_size": tokenizer.vocab_size}
        manifest["prompt_tokens"] = {"median": statistics.median(lengths), "longest": max(lengths)}
    return manifest


def _source(path: Path, counts: Mapping[str, int]) -> dict[str, Any]:
    set_aside = {reason: count for reason, count in counts.items() if reason != "written"}
    return {
        "file": str(path),
        **_hash_of(path),
        "num_rows": sum(counts.values()),
        "num_written": counts.get("written", 0),
        "set_aside": in_order(set_aside),
    }


def _nothing_left(sources: list[dict[str, Any]]) -> list[str]:
    problems: list[str] = []
    for source in sources:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in source["set_aside"].items())
        left = f"none of {source['num_rows']:,} rows is left: {reasons}"
        problems.append(f"{source['file']}: {left if reasons else 'has no rows'}")
    return problems


# ---- files ---------------------------------------------------------------------------------------


@contextmanager
def _partial(path: Path) -> Iterator[IO[bytes]]:
    """A file beside `path`, to be renamed to it; gone at the end if it was not."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
    finally:
        partial.unlink(missing_ok=True)


def _size(path: Path) -> int:
    if path.suffix != ".parquet":
        return path.stat().st_size
    import pyarrow.parquet

    return pyarrow.parquet.read_metadata(path).num_rows


def _stems(paths: tuple[Path, ...]) -> list[str]:
    """A name of each file, for ids; the second of a name has its number."""
    seen = Counter[str]()
    stems: list[str] = []
    for path in paths:
        seen[path.stem] += 1
        stems.append(path.stem if seen[path.stem] == 1 else f"{path.stem}-{seen[path.stem]}")
    return stems


def _hash_of(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "num_bytes": path.stat().st_size}
