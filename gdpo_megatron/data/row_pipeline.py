"""From a row of a data set to a row of the schema, or to the reason why it is none."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gdpo_megatron.data.files import RawRow, read_file
from gdpo_megatron.data.formats import FORMATS, BadAnswer, Format, OtherTask
from gdpo_megatron.data.overlap import Leak, LeakIndex, normalized
from gdpo_megatron.data.rows import template_fields, template_value
from gdpo_megatron.data.schema import (
    RESERVED_KEYS,
    REWARDS_KEY,
    BadField,
    Message,
    PreparedRow,
    check_prompt,
    describe,
    is_blank,
    prompt_text,
    task_text,
)
from gdpo_megatron.data.set_aside import SetAside
from gdpo_megatron.data.tokenizer import Tokenizer
from gdpo_megatron.errors import InputError, did_you_mean

TEMPLATE_OPTION = "--prompt-template"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareOptions:
    """What `gdpo-megatron data prepare` is told.

    Args:
        format: name in `FORMATS`, or `./file.py:function`.
        inputs: files, in order.
        output: the .jsonl file; the other two are beside it.
        format_args: keyword arguments of the format's function.
        check_answers: type of the reward that must be able to read the answers; default what the
            format says.
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
    check_answers: str | None = None
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


class RowPipeline:
    """The checks of all rows of all files, which know the rows before.

    Args:
        options: what to do.
        tokenizer: for `max_prompt_tokens`; with one, prompts are counted.
        base_dir: folder that a format's `./file.py:function` starts from.

    Attributes:
        source: name of the data set.
        num_written: rows that have passed.
        num_repaired: of these, with a field `repaired`.
        prompt_lengths: of these, in tokens.
        allowed_leaks: of these, that are in an evaluation set.

    Raises:
        InputError: no such format, arguments it does not take, a bad template, or evaluation sets
            that are not of the schema.
    """

    def __init__(self, options: PrepareOptions, tokenizer: Tokenizer | None, base_dir: Path | None):
        self._options, self._tokenizer = options, tokenizer
        self._format = Format.of(FORMATS.get(options.format, base_dir))
        self._check_answer = _answer_check(
            options.check_answers or self._format.answer_reward, base_dir
        )
        self.source = options.source or options.format.rsplit(":", 1)[-1]
        self._check_arguments()
        self._template_fields = template_fields(options.prompt_template, TEMPLATE_OPTION)
        self._leaks = _leak_index(options)
        self._where_id: dict[str, str] = {}
        self._where_prompt: dict[bytes, tuple[str, str | None]] = {}
        self.prompt_lengths: list[int] = []
        self.allowed_leaks: list[dict[str, Any]] = []
        self.num_repaired = 0
        self.num_written = 0

    def row(self, raw: RawRow, path: Path, stem: str) -> PreparedRow:
        """Pass a row through.

        Args:
            raw: the row.
            path: its file.
            stem: what the file is called in ids.

        Raises:
            SetAside: it is not to be written.
        """
        if raw.fault is not None:
            raise SetAside(raw.fault, raw.problem)
        assert raw.row is not None
        row = self._convert(raw.row, f"{self.source}/{stem}/{raw.line}")
        where = f"{path}:{raw.line}"
        if row.answer is not None and self._check_answer is not None:
            try:
                self._check_answer(row.answer)
            except (ValueError, RecursionError) as error:
                raise SetAside("bad_answer", str(error)) from error
        self._refuse_duplicate(row)
        leak = self._leaks.find(task_text(row.as_json())) if self._leaks else None
        if leak is not None and not self._options.allow_leaks:
            raise SetAside("leak", str(leak))
        num_tokens = self._num_tokens(row)
        if self._options.limit is not None and self.num_written >= self._options.limit:
            raise SetAside("beyond_limit", f"{self._options.limit} rows are written")
        self._note_written(row, where, leak, num_tokens)
        return row

    def _check_arguments(self) -> None:
        parameters = list(inspect.signature(self._format.convert).parameters.values())[1:]
        kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        known = [parameter.name for parameter in parameters if parameter.kind in kinds]
        unknown = [name for name in self._options.format_args if name not in known]
        if unknown:
            raise InputError(
                f"format '{self._options.format}' takes no argument '{name}'; "
                f"{did_you_mean(name, known)}"
                for name in unknown
            )

    def _note_written(
        self, row: PreparedRow, where: str, leak: Leak | None, num_tokens: int | None
    ) -> None:
        self.num_written += 1
        self.num_repaired += "repaired" in row.metadata
        self._where_id[row.id] = where
        self._where_prompt[_key(row)] = (where, row.answer)
        if leak is not None:
            found = {"id": row.id, "row": leak.row, "share": round(leak.share, 4)}
            self.allowed_leaks.append(found)
        if num_tokens is not None:
            self.prompt_lengths.append(num_tokens)

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
        if not isinstance(fields, dict):
            raise SetAside("format_failed", f"it returned {describe(fields)}, not a dict")
        try:
            prompt = check_prompt("prompt", fields.get("prompt"))
            if is_blank(prompt):
                raise SetAside("empty_prompt", "the prompt is blank")
            row = {"id": row_id, "source": self.source, "answer": None}
            row |= {k: v for k, v in fields.items() if v is not None or k not in RESERVED_KEYS}
            if isinstance(row["id"], int) and not isinstance(row["id"], bool):
                row["id"] = str(row["id"])
            row |= self._wrapped(raw, prompt, row.get("problem"))
            if self._options.source is not None:
                row["source"] = self._options.source
            if self._options.rewards is not None:
                row[REWARDS_KEY] = list(self._options.rewards)
            return PreparedRow.of(row)
        except BadField as problem:
            raise SetAside("bad_field", str(problem)) from problem

    def _wrapped(
        self, raw: Mapping[str, Any], prompt: str | tuple[Message, ...], problem: str | None
    ) -> dict[str, Any]:
        """The prompt as the options want it; its problem, where they changed the prompt."""
        options = self._options
        if not isinstance(prompt, str):
            if options.prompt_template or options.system_prompt or options.chat:
                raise BadField(
                    "the prompt is chat messages already; --prompt-template, --system-prompt and "
                    "--chat are for texts"
                )
            return {"prompt": prompt}
        text = prompt
        if options.prompt_template is not None:
            fields = {**raw, "prompt": prompt}
            text = options.prompt_template.format_map(
                {it: template_value(fields, it, TEMPLATE_OPTION) for it in self._template_fields}
            )
        wrapped: dict[str, Any] = {"prompt": text}
        if options.chat or options.system_prompt is not None:
            user = {"role": "user", "content": text}
            system = {"role": "system", "content": options.system_prompt}
            wrapped["prompt"] = [user] if options.system_prompt is None else [system, user]
        if problem is None and text != prompt:
            wrapped["problem"] = prompt
        return wrapped

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


def _answer_check(reward_type: str | None, base_dir: Path | None) -> Callable[[str], object] | None:
    if reward_type is None:
        return None
    import gdpo_megatron.rewards  # noqa: F401  # registers the built-in ones
    from gdpo_megatron.rewards.base import REWARDS, RewardFn

    check = RewardFn.of(REWARDS.get(reward_type, base_dir)).check_answer
    if check is None:
        raise InputError(f"reward '{reward_type}' has no check of answers (--check-answers)")
    return check


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


def _key(row: PreparedRow) -> bytes:
    # A digest, for prompts of a large set need not be held.
    return hashlib.sha256(normalized(prompt_text(row.prompt)).encode()).digest()
