"""The `rollout.environment` section: what answers the model between its turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from gdpo_megatron.config.section import PositiveFloat, PositiveInt, section


@section
class EnvironmentConfig:
    """A completion is several turns of the model, with what an environment says in between.

    The environment's tokens count for max_completion_tokens, but are no part of the loss.
    """

    type: str
    """A registered environment (tools), or ./file.py:factory relative to the config file."""

    args: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Keyword arguments for its factory."""

    max_turns: PositiveInt = 8
    """Turns of the model; after the last one the completion ends, whatever the environment says."""

    observation_role: str | None = None
    """Role of the chat message that an observation becomes, by the tokenizer's chat template
    ("tool", "user"); null appends its text as it is."""

    max_observation_tokens: PositiveInt = 512
    """Of one observation's text; what is longer is cut, and says so to the model."""

    step_timeout_seconds: PositiveFloat = 30.0
    """For one call of the environment. One that takes longer is killed, and its rollout has no
    reward."""

    num_workers: PositiveInt = 2
    """Processes that run environments while generation goes on, per engine."""

    worker_memory_mb: PositiveInt = 2048
    """Resident memory of such a process in MiB; above it, it is killed. The rollout whose call it
    was has no reward; the others go on in a new process."""
