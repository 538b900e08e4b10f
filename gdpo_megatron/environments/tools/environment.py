"""The environment `tools`: answers the calls in a turn, and ends with the turn that has none.

    model         <tool_call>
                  {"name": "calculator", "arguments": {"expression": "12 * 34"}}
                  </tool_call>
    environment   <tool_response>
                  408
                  </tool_response>

Each call is answered, in the order of the calls; one that no tool can take with "Error: " and what
is wrong with it. Rewards of every turn:

    calls        calls that a tool took and answered
    call_errors  calls that no tool could take: unreadable, an unknown name, wrong arguments, or
                 beyond `max_calls_per_turn`
    tool_errors  calls that a tool took and answered with an error
    used_tool    1 if the turn has calls and no errors, else 0

It keeps nothing from turn to turn.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Final

from gdpo_megatron.environments.base import ENVIRONMENTS, EnvironmentStep, Task
from gdpo_megatron.environments.tools.base import (
    ArgumentsError,
    Tool,
    ToolError,
    ToolSpec,
    find_tools,
)
from gdpo_megatron.environments.tools.calls import BadCall, Call, read_calls
from gdpo_megatron.errors import InputError, did_you_mean
from gdpo_megatron.sandbox import NUM_TRIES, shared_config, uses_sandbox

REWARD_NAMES: Final = ("calls", "call_errors", "tool_errors", "used_tool")


@ENVIRONMENTS.register("tools")
class ToolsEnvironment:
    """One completion's tools.

    Args:
        tools: names, `./file.py:factory`, or {"type": either, "args": {...}}.
        call_tag: name of the tag around calls, without angle brackets.
        response_tag: of the tag around each answer; None for chat templates that put one.
        surround: put before and behind what is answered to a turn; a line break suits text that
            is appended as it is.
        max_calls_per_turn: calls of one turn that are answered.
        max_result_characters: of one answer; what is longer loses its middle.
        base_dir: folder of the config, from which `./file.py:factory` starts.

    Attributes:
        reward_names: of the rewards that every turn has.
        longest_step_seconds: that programs of the model may take in one step; 0 without any.

    Raises:
        InputError: no such tool, or an argument out of range.
    """

    reward_names: ClassVar = REWARD_NAMES

    def __init__(
        self,
        tools: Sequence[ToolSpec],
        call_tag: str = "tool_call",
        response_tag: str | None = "tool_response",
        surround: str = "",
        max_calls_per_turn: int = 8,
        max_result_characters: int = 2000,
        base_dir: Path | None = None,
    ):
        self._tools = find_tools(tools, base_dir)
        _check_text("call_tag", call_tag)
        if response_tag is not None:
            _check_text("response_tag", response_tag)
        if not isinstance(surround, str):
            raise InputError(f"surround is {surround!r}, not a text")
        _check_positive("max_calls_per_turn", max_calls_per_turn)
        _check_positive("max_result_characters", max_result_characters)
        self._call_tag, self._response_tag, self._surround = call_tag, response_tag, surround
        self._max_calls, self._max_characters = max_calls_per_turn, max_result_characters
        self.longest_step_seconds, self._program_seconds = 0.0, 0.0
        if any(tool.uses_sandbox for tool in self._tools.values()):
            uses_sandbox(self)
            # A program that hangs is an answer to the model; cut off with the step, it is none.
            self._program_seconds = NUM_TRIES * shared_config().wall_seconds
            self.longest_step_seconds = self._program_seconds * min(2, max_calls_per_turn)

    def reset(self, task: Task) -> None:
        """Nothing of the row matters."""

    def step(self, turn: str) -> EnvironmentStep:
        """Answer the calls of a turn.

        Raises:
            Exception: whatever a tool raises but ToolError.
        """
        calls = read_calls(turn, self._call_tag)
        counts = Counter[str]()
        end = time.monotonic() + self._program_seconds
        answers = [self._answer(call, counts, end) for call in calls[: self._max_calls]]
        num_more = len(calls) - len(answers)
        if num_more:
            counts["call_errors"] += num_more
            answers.append(
                f"Error: of the {len(calls)} calls of this turn, only the first "
                f"{self._max_calls} were answered"
            )
        errors = counts["call_errors"] + counts["tool_errors"]
        counts["used_tool"] = int(bool(calls) and not errors)
        rewards = {name: float(counts[name]) for name in REWARD_NAMES}
        if not calls:
            return EnvironmentStep(rewards=rewards, done=True)
        text = "\n".join(map(self._wrap, answers))
        return EnvironmentStep(
            observation=f"{self._surround}{text}{self._surround}", rewards=rewards
        )

    def _answer(self, call: Call | BadCall, counts: Counter[str], end: float) -> str:
        try:
            result = self._tool(call, end)
            counts["calls"] += 1
            return result
        except ArgumentsError as error:
            counts["call_errors"] += 1
            return f"Error: {error}"
        except ToolError as error:
            counts["tool_errors"] += 1
            return str(error)

    def _tool(self, call: Call | BadCall, end: float) -> str:
        if isinstance(call, BadCall):
            raise ArgumentsError(call.problem)
        tool: Tool | None = self._tools.get(call.name)
        if tool is None:
            hint = did_you_mean(call.name, self._tools)
            raise ArgumentsError(f"there is no tool '{call.name[:50]}'; {hint}")
        if tool.uses_sandbox and time.monotonic() > end:
            raise ToolError("Error: not run: the calls before it took too long")
        return tool.call(call.arguments)

    def _wrap(self, answer: str) -> str:
        # A lone surrogate, which JSON can write, is no text that a tokenizer takes.
        answer = answer.encode(errors="replace").decode()
        if len(answer) > self._max_characters:
            head = self._max_characters // 2
            tail = self._max_characters - head
            num_cut = len(answer) - self._max_characters
            answer = f"{answer[:head]}\n[{num_cut} characters cut]\n{answer[-tail:]}"
        if self._response_tag is None:
            return answer
        return f"<{self._response_tag}>\n{answer}\n</{self._response_tag}>"


def _check_text(key: str, value: object) -> None:
    if not isinstance(value, str) or not value or set(value) & set("<>/ \n"):
        raise InputError(f"{key} is {value!r}; give the tag's name without angle brackets")


def _check_positive(key: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{key} is {value!r}; give a whole number above 0")
