"""Data sets of many formats to files of one schema, with all that does not fit set aside.

    FILE.jsonl           rows of the schema (schema.py)
    FILE.rejected.jsonl  every other row: file, line, reason, detail, and the row as it was
    FILE.manifest.json   sources with their hashes, options, counts, hashes of the two files

A row goes through the checks in the order of `Reason` and stays at the first that it fails. Rows in
are rows out plus rows set aside, always. The files appear when they are whole, the manifest last, and
depend on the inputs and options alone: no dates.
"""

from __future__ import annotations

import base64
import hashlib
import inspect
import json
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias, get_args

from gdpo_megatron import __version__
from gdpo_megatron.data.files import Fault, RawRow, check_file, read_file
from gdpo_megatron.data.formats import FORMATS, BadAnswer, Format, OtherTask
from gdpo_megatron.data.overlap import Leak, LeakIndex, normalized
from gdpo_megatron.data.schema import (
    REWARDS_KEY,
    BadField,
    PreparedRow,
    check_prompt,
    is_blank,
    prompt_text,
    task_text,
)
from gdpo_megatron.data.tokenizer import Tokenizer
from gdpo_megatron.errors import InputError, did_you_mean

Reason: TypeAlias = (
    Fault
    | Literal[
        "other_task",
        "bad_field",
        "format_failed",
        "empty_prompt",
        "bad_answer",
        "duplicate_id",
        "duplicate_prompt",
        "leak",
        "prompt_too_long",
        "beyond_limit",
    ]
)
"""Why a row is set aside; docs/data.md has them all."""

REASONS: tuple[str, ...] = tuple(
    reason for part in get_args(Reason) for reason in get_args(part) or (part,)
)

REJECTED_SUFFIX = ".rejected.jsonl"
MANIFEST_SUFFIX = ".manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareOptions:
    """What `gdpo-megatron data prepare` is told.

    Args:
        format: name in `FORMATS`, or `./file.py:function`.
        inputs: files, in order.
        output: the .jsonl file; the other two are beside it.
        format_args: keyword arguments of the format's function.
        source: of all rows; default the format's name.
        rewards: names of the rewards that apply to the rows; None: all.
        prompt_template: wraps a text prompt, as {prompt}; further fields of the row in braces.
        system_prompt: makes a text prompt a chat of system and user message.
        chat: makes a text prompt a chat of one user message.
        max_prompt_tokens: longer prompts are set aside; needs a tokenizer.
        against: evaluation sets that no row may be in.
        ngram_words, leak_share: see `LeakIndex`.
        allow_leaks: keep such rows, and list them in the manifest.
        keep_duplicates: do not set aside rows with the prompt of an earlier one.
        limit: rows written at most.
        overwrite: replace files that are there.
    """

    format: str
    inputs: tuple[Path, ...]
    output: Path
    format_args: Mapping[str, Any] = field(default_factory=dict[str, Any])
    source: str | None = None
    rewards: tuple[str, ...] | None = None
    prompt_template: str | None = None
    system_prompt: str | None = None
    chat: bool = False
    max_prompt_tokens: int | None = None
    against: tuple[Path, ...] = ()
    ngram_words: int = 13
    leak_share: float = 0.5
    allow_leaks: bool = False
    keep_duplicates: bool = False
    limit: int | None = None
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class Prepared:
    """What came of it: the manifest, as it was written, and where the files are."""

    manifest: Mapping[str, Any]
    output: Path
    rejected: Path
    manifest_path: Path


class SetAside(Exception):
    """A row does not go into the output."""

    def __init__(self, reason: Reason, detail: str):
        super().__init__(detail)
        self.reason, self.detail = reason, detail


Progress: TypeAlias = Callable[[Path, int, int], None]
"""Called with a file and how much of it is read, of how much."""


def prepare(
    options: PrepareOptions,
    tokenizer: Tokenizer | None = None,
    *,
    base_dir: Path | None = None,
    progress: Progress = lambda path, done, total: None,
) -> Prepared:
    """Read the inputs and write the three files.

    Args:
        options: what to do.
        tokenizer: for `max_prompt_tokens`.
        base_dir: folder that a format's `./file.py:function` starts from.
        progress: told how far it is.

    Raises:
        InputError: a file that cannot be read, options that do not fit, output that is there
            already, or no row is left; nothing has been written then.
    """
    pipeline = _Pipeline(options, tokenizer, base_dir)
    paths = _output_paths(options)
    sources: list[dict[str, Any]] = []
    with ExitStack() as stack:
        output, rejected = (stack.enter_context(_partial(path)) for path in paths[:2])
        for path, stem in zip(options.inputs, _stems(options.inputs), strict=True):
            counts = Counter[str]()
            total = _size(path)
            for raw in read_file(path):
                try:
                    output.write(pipeline.row(raw, path, stem).line().encode())
                    counts["written"] += 1
                except SetAside as why:
                    counts[why.reason] += 1
                    rejected.write(_rejected_line(path, raw, why))
                progress(path, raw.position, total)
            sources.append(_source(path, counts))
        totals = sum((Counter(source["set_aside"]) for source in sources), Counter[str]())
        num_written = sum(source["num_written"] for source in sources)
        if not num_written:
            raise InputError(_nothing_left(options, totals))
        manifest = pipeline.manifest(sources, num_written, totals)
        for file, name in ((output, "output"), (rejected, "rejected")):
            file.flush()
            path = paths[0] if name == "output" else paths[1]
            manifest[name] = {"file": path.name, **_hash_of(Path(file.name))}
        with _partial(paths[2]) as file:
            file.write((json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode())
            file.flush()
            for partial, path in ((output, paths[0]), (rejected, paths[1]), (file, paths[2])):
                os.fsync(partial.fileno())
                Path(partial.name).replace(path)
    return Prepared(manifest, *paths)


class _Pipeline:
    """From a raw row to a row of the schema, or the reason why it is none."""

    def __init__(self, options: PrepareOptions, tokenizer: Tokenizer | None, base_dir: Path | None):
        self._options, self._tokenizer = options, tokenizer
        self._format = Format.of(FORMATS.get(options.format, base_dir))
        self._check_answer = _answer_check(self._format)
        self._source = options.source or options.format.rsplit(":", 1)[-1]
        _check_options(options, self._format, tokenizer)
        self._template_fields = _template_fields(options.prompt_template)
        self._leaks = _leak_index(options)
        self._where_id: dict[str, str] = {}
        self._where_prompt: dict[bytes, tuple[str, str | None]] = {}
        self._lengths: list[int] = []
        self._allowed_leaks: list[dict[str, Any]] = []
        self._num_repaired = 0
        self._num_written = 0

    def row(self, raw: RawRow, path: Path, stem: str) -> PreparedRow:
        """The row to write; raises SetAside."""
        if raw.fault is not None:
            raise SetAside(raw.fault, raw.problem)
        assert raw.row is not None
        row = self._convert(raw.row, f"{self._source}/{stem}/{raw.line}")
        where = f"{path}:{raw.line}"
        if row.answer is not None and self._check_answer is not None:
            try:
                self._check_answer(row.answer)
            except ValueError as error:
                raise SetAside("bad_answer", str(error)) from error
        self._refuse_duplicate(row)
        leak = self._leaks.find(task_text(row.as_json())) if self._leaks else None
        if leak is not None and not self._options.allow_leaks:
            raise SetAside("leak", str(leak))
        num_tokens = self._num_tokens(row)
        if self._options.limit is not None and self._num_written >= self._options.limit:
            raise SetAside("beyond_limit", f"{self._options.limit} rows are written")
        self._note_written(row, where, leak, num_tokens)
        return row

    def _note_written(
        self, row: PreparedRow, where: str, leak: Leak | None, num_tokens: int | None
    ) -> None:
        self._num_written += 1
        self._num_repaired += "repaired" in row.metadata
        self._where_id[row.id] = where
        self._where_prompt[_key(row)] = (where, row.answer)
        if leak is not None:
            found = {"id": row.id, "row": leak.row, "share": round(leak.share, 4)}
            self._allowed_leaks.append(found)
        if num_tokens is not None:
            self._lengths.append(num_tokens)

    def _convert(self, raw: Mapping[str, Any], row_id: str) -> PreparedRow:
        try:
            fields = self._format.convert(raw, **self._options.format_args)
        except OtherTask as problem:
            raise SetAside("other_task", str(problem)) from problem
        except BadAnswer as problem:
            raise SetAside("bad_answer", str(problem)) from problem
        except BadField as problem:
            raise SetAside("bad_field", str(problem)) from problem
        except Exception as error:  # a format of the user's
            raise SetAside("format_failed", f"{type(error).__name__}: {error}") from error
        try:
            prompt = check_prompt("prompt", fields.get("prompt"))
            if is_blank(prompt):
                raise SetAside("empty_prompt", "the prompt is blank")
            given = {key: value for key, value in fields.items() if value is not None}
            given = {"id": row_id, "source": self._source, "answer": None, **given}
            if isinstance(given["id"], int):
                given["id"] = str(given["id"])
            given |= self._wrapped(raw, prompt, given)
            if self._options.rewards is not None:
                given[REWARDS_KEY] = list(self._options.rewards)
            return PreparedRow.of(given)
        except BadField as problem:
            raise SetAside("bad_field", str(problem)) from problem

    def _wrapped(self, raw: Mapping[str, Any], prompt: Any, given: Mapping[str, Any]) -> Row:
        """The prompt as the options want it, and the problem where that differs."""
        options = self._options
        if not isinstance(prompt, str):
            if options.prompt_template or options.system_prompt or options.chat:
                raise BadField(
                    "the prompt is chat messages already; --prompt-template, --system-prompt and "
                    "--chat are for texts"
                )
            return {"prompt": prompt}
        problem, text = given.get("problem", prompt), prompt
        if options.prompt_template is not None:
            values = {**raw, **given, "prompt": prompt}
            names = {name: _template_value(values, name) for name in self._template_fields}
            text = options.prompt_template.format_map(names)
        wrapped: Any = text
        if options.chat or options.system_prompt is not None:
            wrapped = [{"role": "user", "content": text}]
        if options.system_prompt is not None:
            wrapped.insert(0, {"role": "system", "content": options.system_prompt})
        return {"prompt": wrapped} | ({} if problem == text else {"problem": problem})

    def _refuse_duplicate(self, row: PreparedRow) -> None:
        first = self._where_id.get(row.id)
        if first is not None:
            raise SetAside("duplicate_id", f"id '{row.id}' is that of {first}")
        there = self._where_prompt.get(_key(row))
        if there is not None and not self._options.keep_duplicates:
            where, answer = there
            other = "" if answer == row.answer else ", which has another answer"
            raise SetAside("duplicate_prompt", f"the prompt is that of {where}{other}")

    def _num_tokens(self, row: PreparedRow) -> int | None:
        if self._tokenizer is None:
            return None
        if isinstance(row.prompt, str):
            number = len(self._tokenizer.encode(row.prompt))
        else:
            if not self._tokenizer.has_chat_template:
                raise InputError(
                    f"tokenizer {self._tokenizer.path} has no chat template, and the prompts are "
                    "chat messages; give a tokenizer folder with one"
                )
            try:
                number = len(self._tokenizer.apply_chat_template(row.prompt))
            except InputError as error:
                raise SetAside("bad_field", str(error)) from error
        limit = self._options.max_prompt_tokens
        if limit is not None and number > limit:
            raise SetAside("prompt_too_long", f"{number} tokens, above {limit}")
        return number

    def manifest(
        self, sources: list[dict[str, Any]], num_written: int, totals: Mapping[str, int]
    ) -> dict[str, Any]:
        """All but the two files."""
        options = self._options
        manifest: dict[str, Any] = {
            "gdpo_megatron": __version__,
            "format": options.format,
            "source": self._source,
            "options": _shown_options(options),
            "inputs": sources,
            "num_rows": sum(source["num_rows"] for source in sources),
            "num_written": num_written,
            "num_set_aside": sum(totals.values()),
            "set_aside": _in_order(totals),
            "num_repaired": self._num_repaired,
        }
        if self._leaks is not None:
            manifest["against"] = [{"file": str(p), **_hash_of(p)} for p in options.against]
            manifest["allowed_leaks"] = self._allowed_leaks
        if self._tokenizer is not None:
            manifest["tokenizer"] = {
                "path": str(self._tokenizer.path),
                "vocab_size": self._tokenizer.vocab_size,
            }
            manifest["prompt_tokens"] = {
                "median": statistics.median(self._lengths),
                "longest": max(self._lengths),
            }
        return manifest


Row: TypeAlias = dict[str, Any]


# ---- options -------------------------------------------------------------------------------------


def _check_options(options: PrepareOptions, chosen: Format, tokenizer: Tokenizer | None) -> None:
    problems: list[str] = []
    known = [
        name
        for name, parameter in list(inspect.signature(chosen.convert).parameters.items())[1:]
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    for name in options.format_args:
        if name not in known:
            problems.append(
                f"format '{options.format}' takes no argument '{name}'; {did_you_mean(name, known)}"
            )
    if options.max_prompt_tokens is not None and tokenizer is None:
        problems.append("--max-prompt-tokens needs --tokenizer")
    if not 0 < options.leak_share <= 1:
        problems.append(f"--leak-share is {options.leak_share}; needs to be above 0, at most 1")
    if options.allow_leaks and not options.against:
        problems.append("--allow-leaks needs --against")
    if options.output.suffix != ".jsonl":
        problems.append(f"--output is {options.output}; needs to end in .jsonl")
    for path in (*options.inputs, *options.against):
        try:
            check_file(path)
        except InputError as error:
            problems += error.problems
        if path.resolve() in [it.resolve() for it in _paths(options.output)]:
            problems.append(f"--output {options.output} would replace {path}, which is read")
    if not options.overwrite:
        for path in _paths(options.output):
            if path.exists():
                problems.append(f"{path} is there already; --overwrite replaces it")
    if problems:
        raise InputError(problems)


def _paths(output: Path) -> tuple[Path, Path, Path]:
    return (
        output,
        output.with_suffix(REJECTED_SUFFIX),
        output.with_suffix(MANIFEST_SUFFIX),
    )


def _output_paths(options: PrepareOptions) -> tuple[Path, Path, Path]:
    options.output.parent.mkdir(parents=True, exist_ok=True)
    return _paths(options.output)


def _shown_options(options: PrepareOptions) -> dict[str, Any]:
    names = (
        "format_args",
        "rewards",
        "prompt_template",
        "system_prompt",
        "chat",
        "max_prompt_tokens",
        "ngram_words",
        "leak_share",
        "allow_leaks",
        "keep_duplicates",
        "limit",
    )
    return {name: getattr(options, name) for name in names}


def _answer_check(chosen: Format) -> Callable[[str], object] | None:
    if chosen.answer_reward is None:
        return None
    import gdpo_megatron.rewards  # noqa: F401  # registers the built-in ones
    from gdpo_megatron.rewards.base import REWARDS, RewardFn

    return RewardFn.of(REWARDS.get(chosen.answer_reward)).check_answer


def _template_fields(template: str | None) -> tuple[str, ...]:
    from gdpo_megatron.data.rows import template_fields

    return template_fields(template, "--prompt-template")


def _template_value(values: Mapping[str, Any], name: str) -> str:
    from gdpo_megatron.data.rows import template_value

    return template_value(values, name, "--prompt-template")


def _leak_index(options: PrepareOptions) -> LeakIndex | None:
    if not options.against:
        return None
    index = LeakIndex(
        (named for path in options.against for named in _evaluation_texts(path)),
        ngram_words=options.ngram_words,
        min_share=options.leak_share,
    )
    if not len(index):
        raise InputError(f"--against {', '.join(map(str, options.against))}: no rows")
    return index


def _evaluation_texts(path: Path) -> Iterator[tuple[str, str]]:
    problems: list[str] = []
    for raw in read_file(path):
        try:
            if raw.row is None:
                raise BadField(raw.problem)
            row = PreparedRow.of(raw.row)
        except BadField as problem:
            problems.append(f"{path}:{raw.line}: {problem}")
            continue
        yield f"{path}:{raw.line} ({row.id})", task_text(raw.row)
    if problems:
        shown = [*problems[:5], f"{path}: {len(problems)} bad rows; prepare it first"]
        raise InputError(shown)


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


def _source(path: Path, counts: Mapping[str, int]) -> dict[str, Any]:
    set_aside = {reason: count for reason, count in counts.items() if reason != "written"}
    return {
        "file": str(path),
        **_hash_of(path),
        "num_rows": sum(counts.values()),
        "num_written": counts.get("written", 0),
        "set_aside": _in_order(set_aside),
    }


def _in_order(counts: Mapping[str, int]) -> dict[str, int]:
    return {reason: counts[reason] for reason in REASONS if counts.get(reason)}


def _rejected_line(path: Path, raw: RawRow, why: SetAside) -> bytes:
    """What is wrong with a row, and the row: as a text or bytes where it is none."""
    content: dict[str, Any]
    if raw.row is not None:
        content = {"row": raw.row}
    else:
        try:
            content = {"text": raw.data.decode()}
        except UnicodeDecodeError:
            content = {"base64": base64.b64encode(raw.data).decode()}
    where = {"file": str(path), "line": raw.line, "reason": why.reason, "detail": why.detail}
    text = json.dumps({**where, **content}, ensure_ascii=False, default=repr)
    return text.encode(errors="backslashreplace") + b"\n"


def _key(row: PreparedRow) -> bytes:
    # A digest, for prompts of a large set need not be held.
    return hashlib.sha256(normalized(prompt_text(row.prompt)).encode()).digest()


def _nothing_left(options: PrepareOptions, totals: Mapping[str, int]) -> str:
    files = ", ".join(map(str, options.inputs))
    if not totals:
        return f"{files}: no rows"
    reasons = ", ".join(f"{reason} {count}" for reason, count in _in_order(totals).items())
    return f"{files}: none of {sum(totals.values())} rows is left; set aside: {reasons}"
