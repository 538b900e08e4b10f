"""What a turn asks for: the calls in it, and what is wrong with those that cannot be read.

    <tool_call>
    {"name": "calculator", "arguments": {"expression": "12 * 34"}}
    </tool_call>

One block for each call, as Hermes and Qwen write it, or several calls in a block, one a line, as
ToolRL does; `parameters` is the same as `arguments`. Blocks in the thinking text are none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gdpo_megatron.rewards.builtin import bounded_json

MAX_NESTING = 64
"""Of arguments: a validator needs several frames of Python's stack for each level."""

_KEYS = ("arguments", "parameters")


@dataclass(frozen=True, slots=True)
class Call:
    """A call that can be read."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BadCall:
    """A call that cannot: what is wrong with it, for the model to read."""

    problem: str


def read_calls(turn: str, tag: str) -> list[Call | BadCall]:
    """The calls of a turn, in their order; none where no block is opened behind the thinking text.

    Args:
        turn: what the model wrote.
        tag: name of the tag around calls, without angle brackets.
    """
    text, opening, closing = turn.split("</think>", 1)[-1], f"<{tag}>", f"</{tag}>"
    calls: list[Call | BadCall] = []
    # What is before the first opening tag is no call. A second opening tag ends a block as well.
    for block in text.split(opening)[1:]:
        content, closed, _ = block.partition(closing)
        if closed:
            calls += _read_block(content.strip())
        else:
            calls.append(BadCall(f"the call has no closing {closing}"))
    return calls


def _read_block(content: str) -> Iterator[Call | BadCall]:
    lines = [line for line in re.split(r"\r?\n", content) if line.strip()]
    if len(lines) > 1 and _is_object(lines[0]):
        yield from map(_read_call, lines)
    else:
        yield _read_call(content)


def _is_object(text: str) -> bool:
    try:
        return isinstance(bounded_json.loads(text, max_nesting=MAX_NESTING), dict)
    except ValueError:
        return False


def _read_call(text: str) -> Call | BadCall:
    try:
        call = bounded_json.loads(text, max_nesting=MAX_NESTING)
    except ValueError as error:
        return BadCall(f"the call is not JSON: {error}")
    if not isinstance(call, dict):
        return BadCall('the call must be a JSON object with "name" and "arguments"')
    if not isinstance(call.get("name"), str):
        return BadCall('the call has no "name" that is a string')
    given = [key for key in _KEYS if key in call]
    if len(given) > 1:
        return BadCall('the call has "arguments" and "parameters"; give one of them')
    arguments = call[given[0]] if given else {}
    if not isinstance(arguments, dict):
        return BadCall(f'"{given[0]}" of the call must be a JSON object')
    return Call(call["name"], arguments)
