"""What a small model is shown before RL: short answers in each task's form, some of them spoilt.

A model of a million parameters solves none of these tasks. It can learn their form, so the answers
are short, many are right, and every third is wrong in a way that a reward sees: then rewards differ
within a group and move. Made from prepared rows alone, the same for the same rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Row: TypeAlias = Mapping[str, Any]
"""A prepared row."""

_FIRST_CALL = re.compile(r"<tool_call>\n(.*)\n")
_MAX_CALL_CHARACTERS = 160

_HEDGES = ("", "Let me think about this. ", "Let me think. Wait, is that so? Let me try again. ")

_PROGRAMS = ("print('YES')", "print('NO')", "print(0)", "print(input())", "print(1", "print(x)")
"""Programs of one line that understand nothing; the last two end with an error."""


def tool_call(row: Row, number: int) -> str | None:
    """The gold's first call behind one line of thought; every third lacks the thought."""
    call = _FIRST_CALL.search(row["answer"])
    if call is None or len(call[1]) > _MAX_CALL_CHARACTERS:
        return None
    thought = "" if number % 3 == 2 else "<think> I call a tool. </think>\n"
    return f"{thought}<tool_call>\n{call[1]}\n</tool_call>"


def gsm8k(row: Row, number: int) -> str:
    """The number behind a line of thought; every third lacks a tag, or adds words to the number."""
    answer = row["answer"].replace(",", "")
    thought = f"<think>That makes {answer}."
    if number % 6 == 2:
        return f"{thought}\n<answer>{answer}</answer>"
    if number % 6 == 5:
        return f"{thought}</think>\n<answer>{answer} in all</answer>"
    return f"{thought}</think>\n<answer>{answer}</answer>"


def math(row: Row, number: int) -> str:
    """The boxed answer, behind none, one or several sentences that say nothing."""
    return f"{_HEDGES[number % 3]}The answer is $\\boxed{{{row['answer']}}}$."


def code(row: Row, number: int) -> str:
    """One of a few short programs, whatever is asked."""
    program = _PROGRAMS[number % len(_PROGRAMS)]
    return f"{_HEDGES[number // len(_PROGRAMS) % 3]}\n```python\n{program}\n```".lstrip()


WARM_STARTS: dict[str, Callable[[Row, int], str | None]] = {
    "tool_calling": tool_call,
    "gsm8k": gsm8k,
    "math": math,
    "code": code,
}
"""Task -> the completion to imitate for a row and its number; None leaves the row out."""
