"""The environment `tools`: the model calls tools by JSON, and reads what they answer."""

from gdpo_megatron.environments.tools import calculator, python
from gdpo_megatron.environments.tools.base import (
    TOOLS,
    Tool,
    ToolError,
    ToolFactory,
    ToolSpec,
    find_tools,
    tool_schemas,
)
from gdpo_megatron.environments.tools.environment import REWARD_NAMES, ToolsEnvironment

__all__ = [
    "REWARD_NAMES",
    "TOOLS",
    "Tool",
    "ToolError",
    "ToolFactory",
    "ToolSpec",
    "ToolsEnvironment",
    "calculator",
    "find_tools",
    "python",
    "tool_schemas",
]
