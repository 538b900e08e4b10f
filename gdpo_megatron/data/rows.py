"""Rows of a data file, read and checked before anything else is built.

A file is read once, to its end, and all that is wrong with it is reported together with file and
line, because who repairs data wants the list and not its first entry. Nothing here needs a
tokenizer or a model.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from gdpo_megatron.config.schema import DataConfig
from gdpo_megatron.data.files import read_file
from gdpo_megatron.data.schema import (
    REWARDS_KEY,
    BadField,
    Message,
    check_messages,
    check_reward_names,
    describe,
)
from gdpo_megatron.errors import InputError, did_you_mean

RowKind = Literal["rl", "sft"]
"""What rows are for: `rl` needs a prompt and answer, `sft` a prompt and completion."""

MAX_PROBLEMS = 20
"""So many problems of one file are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRow:
    """One checked row; `prompt` is a text or a chat, `rewards` those that apply (None: all)."""

    line: int
    prompt: str | tuple[Message, ...]
    prompt_id: str
    answer: str | None
    completion: str | None
    metadata: Mapping[str, Any]
    rewards: tuple[str, ...] | None = None


class Problems:
    """What is wrong with one file: equal problems of many lines count as one."""

    def __init__(self, path: Path):
        self._path = path
        self._lines: dict[str, list[int]] = {}

    def add(self, line: int, message: str) -> None:
        """Note a problem of a line, counted from 1."""
        self._lines.setdefault(message, []).append(line)

    def raise_if_any(self) -> None:
        """Raise one InputError with all problems, the first of them in the file first."""
        if not self._lines:
            return
        shown = [
            f"{self._path}:{lines[0]}: {message}{_also(lines[1:])}"
            for message, lines in list(self._lines.items())[:MAX_PROBLEMS]
        ]
        if len(self._lines) > MAX_PROBLEMS:
            shown.append(f"{self._path}: {len(self._lines) - MAX_PROBLEMS} more problems")
        raise InputError(shown)


def _also(lines: list[int]) -> str:
    if not lines:
        return ""
    named, num_unnamed = ", ".join(map(str, lines[:3])), len(lines) - 3
    return f" (also {named}{f' and {num_unnamed} more lines' if num_unnamed > 0 else ''})"


def read_rows(
    config: DataConfig,
    path: str | Path,
    *,
    base_dir: Path | None = None,
    kind: RowKind = "rl",
    reward_names: Collection[str] | None = None,
) -> list[DataRow]:
    """Read all rows of a jsonl or parquet file.

    A template makes the prompt from the row's fields, and prompt_key is then not read. A row's
    `prompt_id` field names it, else its `id`, else "<file name>:<line>". Answers that are no
    strings are written as JSON; null is no answer. A row's `rewards` are the names of those that
    apply to it. Fields that were not used become metadata, and so do these names, which the suite
    reads there.

    Args:
        config: names of the fields.
        path: .jsonl or .parquet; data.train or data.eval.
        base_dir: folder that a relative path starts from; default the working directory.
        kind: which fields are needed.
        reward_names: those of the config, where the rows' own are to be checked against them.

    Raises:
        InputError: no such file, or everything that is wrong with its rows.
    """
    path = (base_dir or Path.cwd()) / path
    parser = _RowParser(config, kind, Problems(path), path.name, reward_names)
    rows: list[DataRow] = []
    for raw in read_file(path):
        if raw.row is None:
            parser.problems.add(raw.line, raw.problem)
        elif row := parser(raw.line, raw.row):
            rows.append(row)
    parser.problems.raise_if_any()
    if not rows:
        raise InputError(f"{path}: has no rows")
    return rows


class _RowParser:
    def __init__(
        self,
        config: DataConfig,
        kind: RowKind,
        problems: Problems,
        file_name: str,
        reward_names: Collection[str] | None,
    ):
        self._config = config
        self._kind = kind
        self.problems = problems
        self._file_name = file_name
        self._reward_names = reward_names
        self._template_fields = template_fields(config.prompt_template)
        self._line_of_id: dict[str, int] = {}

    def __call__(self, line: int, raw: dict[str, Any]) -> DataRow | None:
        rest = dict(raw)
        read_field = {
            "prompt": lambda: self._prompt(raw, rest),
            "answer": lambda: self._answer(raw, rest) if self._kind == "rl" else None,
            "completion": lambda: self._completion(raw, rest) if self._kind == "sft" else None,
            "prompt_id": lambda: self._prompt_id(line, rest),
            "rewards": lambda: self._rewards(rest) if self._kind == "rl" else None,
        }
        values: dict[str, Any] = {}
        for name, read in read_field.items():
            try:
                values[name] = read()
            except BadField as problem:
                self.problems.add(line, str(problem))
        if len(values) < len(read_field):
            return None
        return DataRow(line=line, metadata=rest, **values)

    def _prompt(self, raw: dict[str, Any], rest: dict[str, Any]) -> str | tuple[Message, ...]:
        template, system_prompt = self._config.prompt_template, self._config.system_prompt
        if template is not None:
            values = {name: template_value(raw, name) for name in self._template_fields}
            prompt = template.format_map(values)
        else:
            prompt = _field(raw, "prompt_key", self._config.prompt_key)
            del rest[self._config.prompt_key]
        if isinstance(prompt, str):
            if system_prompt is None:
                return prompt
            return (
                {"role": "system", "content": system_prompt},
                {"role": "user", "content": prompt},
            )
        messages = check_messages(self._config.prompt_key, prompt)
        if system_prompt is not None:
            raise BadField(
                f"field '{self._config.prompt_key}' holds chat messages, and data.system_prompt "
                "is for string prompts; leave it out or put it into the messages"
            )
        return messages

    def _answer(self, raw: dict[str, Any], rest: dict[str, Any]) -> str | None:
        key = self._config.answer_key
        if key is None:
            return None
        answer = _field(raw, "answer_key", key)
        rest.pop(key, None)
        if answer is None or isinstance(answer, str):
            return answer
        try:
            return json.dumps(answer, ensure_ascii=False)
        except TypeError as error:
            raise BadField(f"field '{key}' cannot be written as JSON: {error}") from error

    def _rewards(self, rest: dict[str, Any]) -> tuple[str, ...] | None:
        value = rest.get(REWARDS_KEY)
        if value is None:
            return None
        names = check_reward_names(REWARDS_KEY, value)
        known = names if self._reward_names is None else self._reward_names
        for name in names:
            if name not in known:
                raise BadField(
                    f"field '{REWARDS_KEY}': the config has no reward named '{name}'; "
                    f"{did_you_mean(name, known)}"
                )
        return names

    def _completion(self, raw: dict[str, Any], rest: dict[str, Any]) -> str:
        key = self._config.completion_key
        completion = _field(raw, "completion_key", key)
        rest.pop(key, None)
        if not isinstance(completion, str) or not completion:
            raise BadField(f"field '{key}' must be a text, is {describe(completion)}")
        return completion

    def _prompt_id(self, line: int, rest: dict[str, Any]) -> str:
        key = next((key for key in ("prompt_id", "id") if key in rest), None)
        value = f"{self._file_name}:{line}" if key is None else rest.pop(key)
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise BadField(f"field '{key}' must be a string or integer, is {describe(value)}")
        prompt_id = str(value)
        first_line = self._line_of_id.setdefault(prompt_id, line)
        if first_line != line:
            raise BadField(f"{key} '{prompt_id}' is already that of line {first_line}")
        return prompt_id


def _field(raw: dict[str, Any], option: str, key: str) -> Any:
    if key not in raw:
        raise BadField(f"no field '{key}' (data.{option}); {did_you_mean(key, raw)}")
    return raw[key]


def template_value(raw: Mapping[str, Any], name: str, option: str = "data.prompt_template") -> str:
    """What a field of a row is in a template; raises BadField."""
    if name not in raw:
        raise BadField(f"no field '{name}' ({option}); {did_you_mean(name, raw)}")
    value = raw[name]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadField(f"field '{name}' in {option} must be a text or number, is {describe(value)}")
    return str(value)


def template_fields(template: str | None, option: str = "data.prompt_template") -> tuple[str, ...]:
    """Names of the fields in a template; raises InputError where it is none."""
    if template is None:
        return ()
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"{option}: {error}; write {{{{ for a brace") from error
    names = [name for _, name, _, _ in parts if name is not None]
    for _, name, spec, conversion in parts:
        if name is not None and (spec or conversion or not name.isidentifier()):
            raise InputError(
                f"{option}: '{{{name}}}' must be a field name in braces and nothing "
                "else; write {{ for a brace"
            )
    return tuple(dict.fromkeys(names))
