"""Rows of a data file, read and checked before anything else is built.

A file is read once, to its end, and all that is wrong with it is reported together with file and
line, because who repairs data wants the list and not its first entry. Nothing here needs a
tokenizer or a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from gdpo_megatron.config.schema import DataConfig
from gdpo_megatron.errors import InputError, did_you_mean

Message = dict[str, Any]
"""One turn of a chat: role, content, and what else the template reads."""

RowKind = Literal["rl", "sft"]
"""What rows are for: `rl` needs a prompt and answer, `sft` a prompt and completion."""

MAX_PROBLEMS = 20
"""So many problems of one file are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRow:
    """One checked row; `prompt` is a text or a chat."""

    line: int
    prompt: str | tuple[Message, ...]
    prompt_id: str
    answer: str | None
    completion: str | None
    metadata: Mapping[str, Any]


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
    config: DataConfig, path: str | Path, *, base_dir: Path | None = None, kind: RowKind = "rl"
) -> list[DataRow]:
    """Read all rows of a jsonl or parquet file.

    A template makes the prompt from the row's fields, and prompt_key is then not read. A row's
    `prompt_id` field names it, else its `id`, else "<file name>:<line>". Answers that are no
    strings are written as JSON; null is no answer. Fields that were not used become metadata.

    Args:
        config: names of the fields.
        path: .jsonl or .parquet; data.train or data.eval.
        base_dir: folder that a relative path starts from; default the working directory.
        kind: which fields are needed.

    Raises:
        InputError: no such file, or everything that is wrong with its rows.
    """
    path = (base_dir or Path.cwd()) / path
    parser = _RowParser(config, kind, Problems(path), path.name)
    rows = [row for line, raw in _read_raw(path, parser.problems) if (row := parser(line, raw))]
    parser.problems.raise_if_any()
    if not rows:
        raise InputError(f"{path}: has no rows")
    return rows


class _RowParser:
    def __init__(self, config: DataConfig, kind: RowKind, problems: Problems, file_name: str):
        self._config = config
        self._kind = kind
        self.problems = problems
        self._file_name = file_name
        self._template_fields = _template_fields(config.prompt_template)
        self._line_of_id: dict[str, int] = {}

    def __call__(self, line: int, raw: dict[str, Any]) -> DataRow | None:
        rest = dict(raw)
        read_field = {
            "prompt": lambda: self._prompt(raw, rest),
            "answer": lambda: self._answer(raw, rest) if self._kind == "rl" else None,
            "completion": lambda: self._completion(raw, rest) if self._kind == "sft" else None,
            "prompt_id": lambda: self._prompt_id(line, rest),
        }
        values: dict[str, Any] = {}
        for name, read in read_field.items():
            try:
                values[name] = read()
            except _BadField as problem:
                self.problems.add(line, str(problem))
        if len(values) < len(read_field):
            return None
        return DataRow(line=line, metadata=rest, **values)

    def _prompt(self, raw: dict[str, Any], rest: dict[str, Any]) -> str | tuple[Message, ...]:
        template, system_prompt = self._config.prompt_template, self._config.system_prompt
        if template is not None:
            values = {name: _template_value(raw, name) for name in self._template_fields}
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
        messages = _messages(self._config.prompt_key, prompt)
        if system_prompt is not None:
            raise _BadField(
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
            raise _BadField(f"field '{key}' cannot be written as JSON: {error}") from error

    def _completion(self, raw: dict[str, Any], rest: dict[str, Any]) -> str:
        key = self._config.completion_key
        completion = _field(raw, "completion_key", key)
        rest.pop(key, None)
        if not isinstance(completion, str) or not completion:
            raise _BadField(f"field '{key}' must be a text, is {_describe(completion)}")
        return completion

    def _prompt_id(self, line: int, rest: dict[str, Any]) -> str:
        key = next((key for key in ("prompt_id", "id") if key in rest), None)
        value = f"{self._file_name}:{line}" if key is None else rest.pop(key)
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise _BadField(f"field '{key}' must be a string or integer, is {_describe(value)}")
        prompt_id = str(value)
        first_line = self._line_of_id.setdefault(prompt_id, line)
        if first_line != line:
            raise _BadField(f"{key} '{prompt_id}' is already that of line {first_line}")
        return prompt_id


class _BadField(ValueError):
    """What is wrong with a field of a row."""


def _field(raw: dict[str, Any], option: str, key: str) -> Any:
    if key not in raw:
        raise _BadField(f"no field '{key}' (data.{option}); {did_you_mean(key, raw)}")
    return raw[key]


def _template_value(raw: dict[str, Any], name: str) -> str:
    value = _field(raw, "prompt_template", name)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise _BadField(
            f"field '{name}' in data.prompt_template must be a text or number, "
            f"is {_describe(value)}"
        )
    return str(value)


def _messages(key: str, value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _BadField(
            f"field '{key}' must be a text or a list of chat messages, is {_describe(value)}"
        )
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise _BadField(f"field '{key}', message {number}: is {_describe(message)}, not a dict")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                raise _BadField(
                    f"field '{key}', message {number}: '{name}' must be a text, "
                    f"is {_describe(message[name]) if name in message else 'missing'}"
                )
    return tuple(value)


def _template_fields(template: str | None) -> tuple[str, ...]:
    if template is None:
        return ()
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"data.prompt_template: {error}; write {{{{ for a brace") from error
    names = [name for _, name, _, _ in parts if name is not None]
    for _, name, spec, conversion in parts:
        if name is not None and (spec or conversion or not name.isidentifier()):
            raise InputError(
                f"data.prompt_template: '{{{name}}}' must be a field name in braces and nothing "
                "else; write {{ for a brace"
            )
    return tuple(dict.fromkeys(names))


def _describe(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, (str, list, dict)) and not value:
        return f"an empty {type(value).__name__}"
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"


# --- Files --------------------------------------------------------------------------------------


def _read_raw(path: Path, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line or row number from 1, row)."""
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise InputError(f"data file {path}: must be {' or '.join(readers)}")
    if not path.is_file():
        if not path.parent.is_dir():
            raise InputError(f"data file {path}: there is no folder {path.parent}")
        beside = [file.name for file in path.parent.iterdir() if file.suffix in readers]
        raise InputError(f"data file {path}: no such file; {did_you_mean(path.name, beside)}")
    return readers[path.suffix](path, problems)


def _read_jsonl(path: Path, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open("rb") as file:
            for line, data in enumerate(file, start=1):
                if not data.strip():
                    continue
                try:
                    raw = json.loads(data.rstrip())
                except json.JSONDecodeError as error:
                    problems.add(line, f"bad JSON: {error.msg} (column {error.colno})")
                    continue
                except UnicodeDecodeError as error:
                    problems.add(line, f"not UTF-8 (byte {error.start + 1} of the line)")
                    continue
                except (ValueError, RecursionError) as error:
                    problems.add(line, f"bad JSON: {error}")
                    continue
                if b"\\ud" in data.lower() and not _is_unicode(raw):
                    problems.add(line, "holds half of a surrogate pair (\\ud8xx to \\udfxx)")
                    continue
                if isinstance(raw, dict):
                    yield line, raw
                else:
                    problems.add(line, f"must be an object, is {_describe(raw)}")
    except OSError as error:
        raise InputError(f"data file {path}: cannot be read: {error.strerror}") from error


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(path: Path, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        line = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for raw in batch.to_pylist():
                    line += 1
                    yield line, raw
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"data file {path}: no readable parquet file: {error}") from error
