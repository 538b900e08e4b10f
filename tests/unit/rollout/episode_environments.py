"""Environments of the tests of episodes, where the pool's workers find them."""

from __future__ import annotations

import os
import time
from pathlib import Path

from gdpo_megatron.environments.base import EnvironmentStep, Task


class Echo:
    """Answers with how much it has seen, in text that tokenizers cut in many ways."""

    def __init__(self, num_turns: int = 100):
        self._num_turns = num_turns

    def reset(self, task: Task) -> None:
        self._task, self._turns = task, list[str]()

    def step(self, turn: str) -> EnvironmentStep:
        self._turns.append(turn)
        number = len(self._turns)
        return EnvironmentStep(
            observation=f" \u00e9{number}\u00a0\U0001f642",
            rewards={"turn": float(number), "length": float(len(turn))},
            done=number == self._num_turns,
        )


class Scripted:
    """Does what the turn says; what it answers shows what it has been told."""

    def __init__(self, folder: str = ""):
        self._folder = folder

    def reset(self, task: Task) -> None:
        self._task, self._turns = task, list[str]()

    def step(self, turn: str) -> EnvironmentStep:
        self._turns.append(turn)
        if turn == "hang":
            time.sleep(6000)
        if turn == "eat":
            self._eaten = bytearray(2**30)
        if turn == "die":
            os._exit(3)
        if turn.startswith("die once"):
            marker = Path(self._folder, turn.replace(" ", "_"))
            if not marker.exists():
                marker.touch()
                os._exit(3)
        if turn == "raise":
            raise KeyError("no such thing")
        if turn == "nothing":
            return None  # pyright: ignore[reportReturnType]
        print("said:", turn)
        said = f"{self._task.prompt}/{self._task.answer}/{'+'.join(self._turns)}"
        return EnvironmentStep(observation=f"{os.getpid()} {said}", rewards={"n": 1.0})


def needs_a_number(number: int) -> Echo:
    if number < 1:
        raise ValueError(f"number is {number}; needs 1 or more")
    return Echo(number)


def no_environment() -> object:
    return object()


class FailsForSome(Echo):
    """Raises for turns of odd length."""

    def step(self, turn: str) -> EnvironmentStep:
        if len(turn) % 2:
            raise ValueError("an odd turn")
        return super().step(turn)
