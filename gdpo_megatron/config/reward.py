"""A reward of a run, and what it may depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from gdpo_megatron.config.section import section


@section
class GateConfig:
    """Condition on another reward (paper eq. 8): below the bound, the gated reward is 0."""

    reward: str
    """Name of the reward that is looked at (its raw value)."""

    gte: float
    """The gated reward counts only where that reward is at least this."""


@section
class RewardFnConfig:
    """A reward that is measured."""

    name: str
    """Its name in metrics and messages; unique."""

    type: str
    """A registered reward, or ./file.py:function relative to the config file."""

    args: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Keyword arguments for the reward function."""

    when: GateConfig | None = None
    """Optional condition, applied before any normalisation."""


@section
class RewardConfig(RewardFnConfig):
    """One reward of the run."""

    weight: float = 1.0
    """Its weight in the advantage; this is the weights' only home."""
