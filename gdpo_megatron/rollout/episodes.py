"""Turns of completions: between the engine, which writes them, and the environments, which answer.

A completion that an environment answers goes back to the engine as what was carried of it: all
tokens so far, the environment's among them, exactly as they are. So the engine reads token ids that
were drawn or encoded once, and the trainer gets the same ones.

The leader of an engine asks the environments; what they say is told to its other ranks, so that all
of them submit the same requests in the same order, whenever an answer comes.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from gdpo_megatron.config.environment import EnvironmentConfig
from gdpo_megatron.data.chat_turns import ObservationEncoder
from gdpo_megatron.data.tokenizer import Tokenizer
from gdpo_megatron.distributed.mesh import EngineMesh
from gdpo_megatron.environments.base import Task
from gdpo_megatron.environments.pool import Answer, EnvironmentPool, Fault
from gdpo_megatron.types import Completion, Prompt, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentReport:
    """What environments did in a step; all zero without one.

    Args:
        num_calls: turns that one was asked about.
        num_tokens: tokens that they added to completions.
        num_cut: completions that ended because max_turns was reached.
        num_faults: completions whose environment gave no answer.
        num_restarts: processes that had to be started anew.
        seconds: of all calls together, in whatever process.
        traceback: of the first exception of an environment.
    """

    num_calls: int = 0
    num_tokens: int = 0
    num_cut: int = 0
    num_faults: int = 0
    num_restarts: int = 0
    seconds: float = 0.0
    traceback: str = ""

    def as_json(self) -> dict[str, Any]:
        """As keyword arguments."""
        return asdict(self)

    @classmethod
    def joined(cls, reports: Sequence[EnvironmentReport]) -> EnvironmentReport:
        """Of several engines, or rounds of a step."""
        tracebacks = [report.traceback for report in reports if report.traceback]
        numbers = [f.name for f in fields(cls) if f.name != "traceback"]
        total = {name: sum(getattr(report, name) for report in reports) for name in numbers}
        return cls(**total, traceback=next(iter(tracebacks), ""))


@dataclass(slots=True)
class _Episode:
    """A completion under way.

    Args:
        prompt: of it.
        number: that the pool knows it by.
        turns: so far.
        num_given: tokens that the engine was given to go on from.
        waiting: what there is of it, while its environment is asked.
        fault: why its environment gave no answer.
    """

    prompt: Prompt
    number: int
    turns: list[Turn] = field(default_factory=list[Turn])
    num_given: int = 0
    waiting: Completion | None = None
    fault: str = ""


class EnvironmentRuntime:
    """The environments of this rank's engine, for all steps of a run.

    Args:
        config: the `rollout.environment` section.
        pool: of the leader; None on the engine's other ranks.
        tokenizer: of the policy.
        engines: the engines' mesh.
        device: where collectives run.

    Raises:
        InputError: see ObservationEncoder.
    """

    def __init__(
        self,
        config: EnvironmentConfig,
        pool: EnvironmentPool | None,
        tokenizer: Tokenizer,
        engines: EngineMesh,
        device: torch.device,
    ):
        self.config, self.pool, self.tokenizer = config, pool, tokenizer
        self.encoder = ObservationEncoder(
            tokenizer, role=config.observation_role, max_tokens=config.max_observation_tokens
        )
        self._engines, self._device = engines, device
        self._numbers = itertools.count()

    def next_number(self) -> int:
        """A number that no episode of the run has; ranks of an engine draw them alike."""
        return next(self._numbers)

    def start(self) -> None:
        """Start the environments' processes, on the leader; returns at once."""
        if self.pool is not None:
            self.pool.start()

    def __enter__(self) -> EnvironmentRuntime:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.pool is not None:
            self.pool.close()

    def shared(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on the leader, JSON, on all ranks of the engine; collective there."""
        if self._engines.tp_size == 1:
            return make()
        source, group = self._engines.leader(self._engines.replica), self._engines.tp_group
        text = json.dumps(make()).encode() if self._engines.tp_rank == 0 else b""
        size = torch.tensor([len(text)], device=self._device)
        dist.broadcast(size, source, group=group)
        # On the other ranks as many bytes, to be written over; a JSON text is never empty.
        data = torch.frombuffer(bytearray(text or int(size)), dtype=torch.uint8).to(self._device)
        dist.broadcast(data, source, group=group)
        return json.loads(bytes(data.tolist()))


class Episodes:
    """The episodes of one generation; the same on all ranks of the engine.

    Args:
        runtime: of the run.
        max_completion_tokens: of a completion, the environment's tokens included.
    """

    def __init__(self, runtime: EnvironmentRuntime, max_completion_tokens: int):
        self._runtime, self._limit = runtime, max_completion_tokens
        self._episodes: dict[int, _Episode] = {}
        self._sample_of: dict[int, int] = {}
        self._counts = Counter[str]()
        self._seconds, self._traceback = 0.0, ""

    def begin(self, sample: int, prompt: Prompt) -> None:
        """Start the episode of a completion."""
        self._episodes[sample] = _Episode(prompt, self._runtime.next_number())

    def turn_ended(self, sample: int, completion: Completion) -> bool:
        """Take a turn that the engine has finished.

        Args:
            sample: the completion's id.
            completion: all of its tokens, the environment's included.

        Returns:
            Whether its environment was asked; if not, the completion is at its end.
        """
        episode = self._episodes[sample]
        tokens = completion.token_ids[episode.num_given :]
        episode.turns.append(
            Turn(
                start=episode.num_given,
                end=len(completion.token_ids),
                text=self._runtime.tokenizer.decode(tokens),
            )
        )
        if completion.finish_reason != "stop":
            self._forget(episode)
            return False
        episode.waiting = completion
        self._sample_of[episode.number] = sample
        self._counts["num_calls"] += 1
        if self._runtime.pool is not None:
            prompt = episode.prompt
            self._runtime.pool.step(
                episode.number,
                Task(prompt=prompt.text, answer=prompt.answer, metadata=prompt.metadata),
                [turn.text for turn in episode.turns],
            )
        return True

    def answers(self, *, wait: bool) -> list[tuple[int, Completion, bool]]:
        """Take the answers that have come; collective over the engine's ranks.

        Args:
            wait: for at least one.

        Returns:
            (sample, what there is of it, whether it goes on) of each.
        """
        if not self._sample_of:
            return []
        pool = self._runtime.pool
        told = self._runtime.shared(
            lambda: [_as_json(it) for it in pool.answers(wait=wait)] if pool else []
        )
        return [self._take(it) for it in told]

    def _take(self, told: Mapping[str, Any]) -> tuple[int, Completion, bool]:
        sample = self._sample_of.pop(told["episode"])
        episode = self._episodes[sample]
        completion, episode.waiting = episode.waiting, None
        assert completion is not None
        self._seconds += told["seconds"]
        if "fault" in told:
            episode.fault = told["fault"]
            self._counts["num_faults"] += 1
            self._traceback = self._traceback or told["traceback"]
            self._forget(episode)
            return sample, completion, False
        turn = replace(episode.turns[-1], rewards=told["rewards"])
        episode.turns[-1] = turn
        if told["done"] or len(episode.turns) == self._runtime.config.max_turns:
            self._counts["num_cut"] += not told["done"]
            self._forget(episode)
            return sample, completion, False
        token_ids, text = self._runtime.encoder.encode(
            told["observation"], completion.token_ids[-1]
        )
        if len(completion.token_ids) + len(token_ids) >= self._limit:
            self._forget(episode)
            return sample, replace(completion, finish_reason="length"), False
        episode.turns[-1] = replace(turn, observation=text)
        self._counts["num_tokens"] += len(token_ids)
        episode.num_given = len(completion.token_ids) + len(token_ids)
        further = replace(
            completion,
            token_ids=(*completion.token_ids, *token_ids),
            logprobs=(*completion.logprobs, *([0.0] * len(token_ids))),
            finish_reason="abort",  # as of any completion that goes on
        )
        return sample, further, True

    def turns(self, sample: int) -> tuple[Turn, ...]:
        """The turns of a completion so far."""
        return tuple(self._episodes[sample].turns)

    def fault(self, sample: int) -> str:
        """Why a completion's environment gave no answer; "" where it did."""
        return self._episodes[sample].fault

    def report(self) -> EnvironmentReport:
        """What environments did, so far."""
        pool = self._runtime.pool
        return EnvironmentReport(
            **self._counts,
            num_restarts=pool.take_counts().total() if pool is not None else 0,
            seconds=self._seconds,
            traceback=self._traceback,
        )

    def _forget(self, episode: _Episode) -> None:
        if self._runtime.pool is not None:
            self._runtime.pool.forget([episode.number])


def _as_json(answer: Answer) -> dict[str, Any]:
    told: dict[str, Any] = {"episode": answer.episode, "seconds": answer.seconds}
    outcome = answer.outcome
    if isinstance(outcome, Fault):
        return told | {"fault": str(outcome), "traceback": outcome.traceback}
    return told | {
        "observation": outcome.observation,
        "rewards": dict(outcome.rewards),
        "done": outcome.done,
    }
