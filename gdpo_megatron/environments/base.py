"""The contract of an environment: what the model writes in a turn goes in, what it reads next out.

    environment = factory(**args)                 one for each completion
    environment.reset(task)                       the row of the data set that it belongs to
    step = environment.step(turn)                 after each turn; until step.done

It runs in a process of its own, which can be killed. Its state is then made anew by giving the same
turns to a fresh instance: what it answers must depend on the task and the turns alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Final, Protocol, TypeAlias

from gdpo_megatron.registry import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What an environment is told of the row that it serves.

    Args:
        prompt: the prompt's text, chat template included.
        answer: the row's `data.answer_key`; None where the row has none. The model does not see it.
        metadata: the row's other fields.
    """

    prompt: str
    answer: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentStep:
    """What came of a turn.

    Args:
        observation: what the model reads next, as text; not used where `done`.
        rewards: any number of named rewards of this turn; the reward `environment` reads them.
        done: the completion ends here.

    Raises:
        TypeError: observation is no text, or a reward no number.
        ValueError: a reward is not finite, or an observation is missing where the episode goes on.
    """

    observation: str = ""
    rewards: Mapping[str, float] = field(default_factory=dict[str, float])
    done: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.observation, str):
            raise TypeError(f"observation must be a text, is {type(self.observation).__name__}")
        if not (self.done or self.observation):
            raise ValueError("observation is empty, but done is False; the model needs an answer")
        for name, value in self.rewards.items():
            if not isinstance(name, str) or not isinstance(value, Real):
                raise TypeError(f"rewards must map names to numbers; {name!r} is {value!r}")
            if not math.isfinite(value):
                raise ValueError(f"reward {name!r} is {value}")


class Environment(Protocol):
    """One episode: a completion's other party."""

    def reset(self, task: Task) -> None:
        """Begin; called once, before the first `step`."""
        ...

    def step(self, turn: str) -> EnvironmentStep:
        """Answer a turn of the model.

        Args:
            turn: its text, special tokens removed, a stop string that ended it included.
        """
        ...


EnvironmentFactory: TypeAlias = Callable[..., Environment]

ENVIRONMENTS: Final[Registry[EnvironmentFactory]] = Registry(
    "environment", "gdpo_megatron.environments"
)
