"""A process that runs environments: `python -m gdpo_megatron.environments.worker`.

Lines of JSON come in on standard input and go out on what was standard output. It keeps the
environments of the episodes that it was asked about; one that it does not know, because the process
before it was killed, is made anew and given the turns that there were.

    {"plan": ...}                                        --> {"ready": true} or {"failed": why}
    {"episode": 7, "task": {...}, "turns": ["...", ...]} --> {"observation", "rewards", "done"}
                                                             or {"raised": why, "traceback": ...}
    {"forget": [7, ...]}
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

_TRACEBACK_CHARACTERS = 8000


def main() -> None:
    """Serve the process that started this one, until standard input ends."""
    from gdpo_megatron.processes import die_with_parent

    die_with_parent(signal.SIGKILL)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what an environment prints goes to the log

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    requests = map(json.loads, sys.stdin.buffer)
    try:
        episodes = _Episodes(next(requests)["plan"])
    except BaseException as error:
        reply({"failed": f"{type(error).__name__}: {error}"})
        return
    reply({"ready": True})
    for request in requests:
        if "forget" in request:
            episodes.forget(request["forget"])
        else:
            reply(episodes.answer(request))


class _Episodes:
    def __init__(self, plan: dict[str, Any]):
        sys.path[:] = plan["import_path"]
        # What follows may be found on that path only.
        from gdpo_megatron import sandbox
        from gdpo_megatron.config.sandbox import SandboxConfig
        from gdpo_megatron.environments.resolve import environment_factory

        sandbox.configure(SandboxConfig(**plan["sandbox"]))
        self._make = environment_factory(plan["type"], plan["args"], Path(plan["base_dir"]))
        self._known: dict[int, tuple[list[str], Any]] = {}

    def forget(self, episodes: list[int]) -> None:
        for episode in episodes:
            self._known.pop(episode, None)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Give an episode its last turn; what it raises is an answer too."""
        try:
            return self._step(request)
        except BaseException as error:
            self._known.pop(request["episode"], None)
            return {
                "raised": f"{type(error).__name__}: {error}"[:200],
                "traceback": traceback.format_exc()[-_TRACEBACK_CHARACTERS:],
            }

    def _step(self, request: dict[str, Any]) -> dict[str, Any]:
        from gdpo_megatron.environments.base import EnvironmentStep, Task

        *before, turn = request["turns"]
        seen, environment = self._known.get(request["episode"], ([], None))
        if environment is None or seen != before:
            environment = self._make()
            environment.reset(Task(**request["task"]))
            for earlier in before:
                environment.step(earlier)
        step = environment.step(turn)
        if not isinstance(step, EnvironmentStep):
            raise TypeError(f"step returned {type(step).__name__}, not EnvironmentStep")
        self._known[request["episode"]] = ([*before, turn], environment)
        return {
            "observation": step.observation,
            "rewards": {name: float(value) for name, value in step.rewards.items()},
            "done": bool(step.done),
        }


if __name__ == "__main__":
    main()
