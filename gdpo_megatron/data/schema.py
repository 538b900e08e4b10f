"""The schema of prepared data: one JSON object a line, and what its fields must be.

    id        text, unique in its file, "gsm8k/train/12"
    prompt    text, or chat messages [{"role": text, "content": text}, ...]; not blank
    answer    text given to rewards, or null where a row has none
    source    text: the data set, "gsm8k"
    rewards   optional: names of the config's rewards that apply to this row; not given: all do
    problem   optional text: the task alone where the prompt wraps it; what is compared with others
    solution  optional text: a reference solution; nothing reads it in training

Any further field goes to rewards as metadata. Runs read these files with the defaults of
`data.prompt_key` and `data.answer_key`; docs/data.md is the same for users.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
"""One turn of a chat: role, content, and what else the template reads."""

REWARDS_KEY = "rewards"
"""Field with the names of the rewards that apply to a row."""


_OTHER_ID = "prompt_id"
"""What a run takes for the id before it looks for `id`."""


class BadField(ValueError):
    """What is wrong with a field of a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRow:
    """A row of the schema; see above for its fields.

    Args:
        metadata: all further fields.
    """

    id: str
    prompt: str | tuple[Message, ...]
    answer: str | None
    source: str
    rewards: tuple[str, ...] | None = None
    problem: str | None = None
    solution: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> PreparedRow:
        """The row that a JSON object holds.

        Raises:
            BadField: the first of `row_problems`.
        """
        values = {key: check(raw, key) for key, check in _CHECKS.items()}
        rest = {key: value for key, value in raw.items() if key not in _CHECKS}
        _check_metadata(rest)
        return cls(**values, metadata=rest)

    def as_json(self) -> dict[str, Any]:
        """The object that `of` reads; optional fields only where they are given."""
        optional = {
            key: getattr(self, key)
            for key in ("rewards", "problem", "solution")
            if getattr(self, key) is not None
        }
        return {
            "id": self.id,
            "prompt": self.prompt,
            "answer": self.answer,
            "source": self.source,
            **optional,
            **self.metadata,
        }

    def line(self) -> str:
        """The row as a line of a file, with its line break."""
        return json.dumps(self.as_json(), ensure_ascii=False, allow_nan=False) + "\n"


def row_problems(raw: Mapping[str, Any]) -> list[str]:
    """All that keeps an object from being a row of the schema, one line each."""
    problems: list[str] = []
    for key, check in _CHECKS.items():
        try:
            check(raw, key)
        except BadField as problem:
            problems.append(str(problem))
    try:
        _check_metadata({key: value for key, value in raw.items() if key not in _CHECKS})
    except BadField as problem:
        problems.append(str(problem))
    return problems


def prompt_text(prompt: str | tuple[Message, ...]) -> str:
    """The prompt as one text, each message behind its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def task_text(raw: Mapping[str, Any]) -> str:
    """What a row asks, for comparison: its problem, else its prompt without system messages."""
    if raw.get("problem") is not None:
        return str(raw["problem"])
    prompt = raw["prompt"]
    if isinstance(prompt, str):
        return prompt
    return "\n".join(it["content"] for it in prompt if it["role"] != "system")


# ---- the fields ----------------------------------------------------------------------------------


def check_prompt(key: str, value: Any) -> str | tuple[Message, ...]:
    """A text or chat messages; raises BadField."""
    return value if isinstance(value, str) else check_messages(key, value)


def check_messages(key: str, value: Any) -> tuple[Message, ...]:
    """Chat messages; raises BadField."""
    if not isinstance(value, list | tuple) or not value:
        raise BadField(
            f"field '{key}' must be a text or a list of chat messages, is {describe(value)}"
        )
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise BadField(f"field '{key}', message {number}: is {describe(message)}, not a dict")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                raise BadField(
                    f"field '{key}', message {number}: '{name}' must be a text, "
                    f"is {describe(message[name]) if name in message else 'missing'}"
                )
    return tuple(value)


def check_reward_names(key: str, value: Any) -> tuple[str, ...]:
    """Names of rewards, at least one, none twice; raises BadField."""
    if (
        not isinstance(value, list | tuple)
        or not value
        or not all(isinstance(name, str) and name for name in value)
    ):
        raise BadField(
            f"field '{key}' must be a list of reward names, is {describe(value)}; leave it out "
            "where all rewards apply"
        )
    if len(set(value)) < len(value):
        raise BadField(f"field '{key}' names a reward twice: {describe(value)}")
    return tuple(value)


def is_blank(prompt: str | tuple[Message, ...]) -> bool:
    """Whether a prompt says nothing beside what a system message says."""
    if isinstance(prompt, str):
        return not prompt.strip()
    return all(not it["content"].strip() for it in prompt if it["role"] != "system")


def describe(value: Any) -> str:
    """A value for a message: short, and with its type."""
    if value is None:
        return "null"
    if isinstance(value, str | list | dict) and not value:
        return f"an empty {type(value).__name__}"
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"


def _given(raw: Mapping[str, Any], key: str) -> Any:
    if key not in raw:
        raise BadField(f"no field '{key}'")
    return raw[key]


def _text(raw: Mapping[str, Any], key: str) -> str:
    value = _given(raw, key)
    if not isinstance(value, str) or not value.strip():
        raise BadField(f"field '{key}' must be a text, is {describe(value)}")
    return value


def _optional_text(raw: Mapping[str, Any], key: str) -> str | None:
    return None if raw.get(key) is None else _text(raw, key)


def _prompt(raw: Mapping[str, Any], key: str) -> str | tuple[Message, ...]:
    prompt = check_prompt(key, _given(raw, key))
    if is_blank(prompt):
        raise BadField(f"field '{key}' is blank")
    return prompt


def _answer(raw: Mapping[str, Any], key: str) -> str | None:
    value = _given(raw, key)
    if value is not None and not isinstance(value, str):
        raise BadField(f"field '{key}' must be a text or null, is {describe(value)}")
    return value


def _rewards(raw: Mapping[str, Any], key: str) -> tuple[str, ...] | None:
    return None if raw.get(key) is None else check_reward_names(key, raw[key])


_CHECKS: dict[str, Callable[[Mapping[str, Any], str], Any]] = {
    "id": _text,
    "prompt": _prompt,
    "answer": _answer,
    "source": _text,
    REWARDS_KEY: _rewards,
    "problem": _optional_text,
    "solution": _optional_text,
}


def _check_metadata(fields: Mapping[str, Any]) -> None:
    if _OTHER_ID in fields:
        raise BadField(f"field '{_OTHER_ID}' would be taken for the id; call it 'id'")
    for key, value in fields.items():
        try:
            json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise BadField(f"field '{key}' cannot be written as JSON: {error}") from error


SCHEMA_KEYS: frozenset[str] = frozenset(_CHECKS)
"""The fields that the schema names."""

RESERVED_KEYS: frozenset[str] = SCHEMA_KEYS | {_OTHER_ID}
"""What metadata cannot be called."""
