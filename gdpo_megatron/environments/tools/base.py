"""The contract of a tool: arguments that fit its JSON schema in, a text out, nothing kept between.

    tool = factory(**args)          once for each completion
    text = tool.function(**arguments)

A tool that keeps something between calls is an environment of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from gdpo_megatron.errors import InputError
from gdpo_megatron.registry import Registry
from gdpo_megatron.rewards.builtin import json_schema


class ToolError(Exception):
    """The call is at fault; the message is what the model reads, as it is.

    Any other exception of a tool is a fault that is not the model's: the rollout has no reward.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """Something that the model may call.

    Args:
        name: what a call names it by.
        description: what it does, for the prompt.
        parameters: JSON schema of its arguments, an object; draft 2020-12 if it names none.
        function: called with the arguments by name, once they are valid; returns a text.
        uses_sandbox: it runs programs by `shared_sandbox`.

    Raises:
        ValueError: parameters is no JSON schema, or none of an object.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    function: Callable[..., str]
    uses_sandbox: bool = False
    _validator: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.parameters.get("type") != "object":
            raise ValueError(f'tool \'{self.name}\': parameters must have "type": "object"')
        try:
            validator = json_schema.validator_of(self.parameters)
        except ValueError as error:
            raise ValueError(f"tool '{self.name}': parameters: {error}") from error
        object.__setattr__(self, "_validator", validator)

    def call(self, arguments: Mapping[str, Any]) -> str:
        """Check the arguments and call the function.

        Raises:
            ArgumentsError: they do not fit the schema.
            ToolError: the tool says that they are wrong.
            TypeError: the function returned no text.
        """
        from jsonschema.exceptions import best_match

        try:
            wrong = best_match(self._validator.iter_errors(arguments))
        except TimeoutError:
            raise ArgumentsError("the arguments take too long to check") from None
        if wrong is not None:
            where = "".join(f"'{step}': " for step in wrong.absolute_path)
            raise ArgumentsError(f"wrong arguments: {where}{_cut(wrong.message)}")
        result = self.function(**arguments)
        if not isinstance(result, str):
            raise TypeError(f"tool '{self.name}' returned {type(result).__name__}, not a text")
        return result

    @property
    def schema(self) -> dict[str, Any]:
        """What a prompt says about it, in the form that chat templates and OpenAI's API take."""
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": dict(self.parameters),
        }
        return {"type": "function", "function": function}


class ArgumentsError(Exception):
    """The arguments of a call do not fit the tool's schema."""


ToolFactory: TypeAlias = Callable[..., Tool]
ToolSpec: TypeAlias = str | Mapping[str, Any]
"""A name or `./file.py:factory`, or {"type": either of these, "args": {...}}."""

TOOLS: Final[Registry[ToolFactory]] = Registry("tool", "gdpo_megatron.tools")
"""Factories of tools."""


def find_tools(specs: Sequence[ToolSpec], base_dir: Path | None = None) -> dict[str, Tool]:
    """Make the tools that a section names.

    Args:
        specs: which ones.
        base_dir: folder that `./file.py:factory` starts from; default the working directory.

    Returns:
        The tools by their names, in the order of `specs`.

    Raises:
        InputError: no such tool, arguments that it does not take, a name used twice.
    """
    if isinstance(specs, str) or not isinstance(specs, Sequence) or not specs:
        raise InputError(f"tools is {specs!r}; give a list of at least one tool")
    tools: dict[str, Tool] = {}
    for index, spec in enumerate(specs):
        where = f"tools[{index}]"
        try:
            tool = _make(spec, base_dir)
        except InputError as error:
            raise InputError([f"{where}: {problem}" for problem in error.problems]) from error
        if tool.name in tools:
            raise InputError(f"{where}: there is a tool '{tool.name}' already")
        tools[tool.name] = tool
    return tools


def tool_schemas(specs: Sequence[ToolSpec], base_dir: Path | None = None) -> list[dict[str, Any]]:
    """What a prompt says about these tools; arguments and errors of `find_tools`."""
    return [tool.schema for tool in find_tools(specs, base_dir).values()]


def _make(spec: Any, base_dir: Path | None) -> Tool:
    if isinstance(spec, str):
        spec = {"type": spec}
    if not isinstance(spec, Mapping) or not isinstance(spec.get("type"), str):
        raise InputError(f"{spec!r} is no tool; give a name, or {{type: name, args: {{...}}}}")
    unknown, args = sorted(spec.keys() - {"type", "args"}), spec.get("args") or {}
    if unknown:
        raise InputError(f"unknown key '{unknown[0]}'; a tool has type and args")
    kind = spec["type"]
    factory = TOOLS.get(kind, base_dir)
    if not callable(factory) or not isinstance(args, Mapping):
        raise InputError(f"'{kind}' needs a factory that can be called, and args by name")
    try:
        inspect.signature(factory).bind(**args)
        tool = factory(**args)
    except (TypeError, ValueError) as error:
        raise InputError(f"'{kind}' refuses its args {dict(args)}: {error}") from error
    if not isinstance(tool, Tool):
        raise InputError(f"'{kind}' makes {type(tool).__name__}, not a Tool")
    return tool


def _cut(message: str, limit: int = 200) -> str:
    return message if len(message) <= limit else f"{message[:limit]}..."
