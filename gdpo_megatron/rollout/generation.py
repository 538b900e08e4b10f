"""One engine's part of a step: asks it for the completions, until it has enough of them.

What is asked for is what is missing: a group that was carried over has some of its completions
whole, and some begun. A completion that comes back is checked before anything is made of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gdpo_megatron.rollout.base import (
    FinishedCompletion,
    RolloutEngine,
    RolloutRequest,
    SamplingParams,
    noise_key,
)
from gdpo_megatron.rollout.episodes import Episodes
from gdpo_megatron.rollout.failure import FailureReport
from gdpo_megatron.rollout.long_tail import CarriedCompletion, GroupRequest, TailCut
from gdpo_megatron.rollout.stall import NO_TOKEN, StallLimit, StallWatch
from gdpo_megatron.types import Completion, Rollout

_NOTHING = CarriedCompletion(
    completion=Completion(token_ids=(), logprobs=(), text="", finish_reason="abort"),
    policy_versions=(),
)


class _CallbackError(Exception):
    """What was called back raised, not the engine."""

    def __init__(self, cause: Exception):
        self.cause = cause


@dataclass(frozen=True, slots=True)
class Noise:
    """What names the sampling noise beside the completion."""

    seed: int
    stream: str

    def key(self, group: GroupRequest, index: int) -> int:
        """Of one completion; the same in every step that asks for it."""
        return noise_key(self.seed, self.stream, group.noise_step, group.noise_group, index)


class Generation:
    """The completions of one engine's groups; the same on all ranks of the engine.

    Args:
        groups: all groups of the batch, by number.
        own: numbers of those that this engine makes.
        group_size: G.
        first_group: number that sample ids start from, in groups.
        noise: of the batch.
        engine: with the version's weights loaded.
        tail: when it is enough.
        on_progress: called with (done, total) completions of this engine.
        on_finished: called with each rollout as soon as it is finished.
        episodes: where environments answer the model; not given, a completion is one turn.
    """

    def __init__(
        self,
        groups: Sequence[GroupRequest],
        own: Sequence[int],
        *,
        group_size: int,
        first_group: int,
        noise: Noise,
        engine: RolloutEngine,
        tail: TailCut,
        on_progress: Callable[[int, int], None],
        on_finished: Callable[[Rollout], None],
        episodes: Episodes | None = None,
    ):
        self.own = tuple(own)
        self._groups, self._size, self._first = groups, group_size, first_group
        self._noise, self._engine, self._tail = noise, engine, tail
        self._episodes = episodes
        self._version = engine.policy_version
        self._on_progress, self._on_finished = on_progress, on_finished
        self._requests: dict[int, RolloutRequest] = {}
        self._num_returned = self._num_done = self._num_generated = self._num_aborted = 0
        # (group, index) -> what is there of it.
        self._state: dict[tuple[int, int], CarriedCompletion] = {}

    def run(
        self, sampling: SamplingParams, stall: StallLimit | None, *, rank: int, replica: int
    ) -> FailureReport | None:
        """Generate until it is enough.

        Args:
            sampling: how tokens are drawn.
            stall: when it counts as stalled.
            rank: of the run, for the report.
            replica: this engine, for the report.

        Returns:
            What happened where the engine failed; None where it did not.
        """
        for finished in self._begin():
            self._on_finished(finished)
        requests, engine = list(self._requests.values()), self._engine
        with StallWatch(engine, stall, rank) as watch:
            try:
                with watch.call(NO_TOKEN):
                    engine.submit(requests, sampling)
                while not self._tail.is_enough():
                    if engine.num_unfinished:
                        self._poll(watch)
                    further = self._take_answers(wait=not engine.num_unfinished)
                    if further:
                        with watch.call(NO_TOKEN):
                            engine.submit(further, sampling)
                with watch.call(NO_TOKEN):
                    engine.abort(list(self._requests))
                while engine.num_unfinished:
                    self._poll(watch)
            except _CallbackError as error:
                raise error.cause from None
            except Exception as error:
                return FailureReport.of(
                    error,
                    rank=rank,
                    replica=replica,
                    num_submitted=len(requests),
                    num_returned=self._num_returned,
                )
        return None

    def _begin(self) -> list[Rollout]:
        """Take what was carried, and make requests for the rest; returns what is finished."""
        finished: list[Rollout] = []
        for g in self.own:
            for index in range(self._size):
                group, part = self._groups[g], self._groups[g].part(index)
                if part is not None:
                    self._state[g, index] = part
                if part is not None and part.is_finished:
                    finished.append(self._finish(g, index))
                    continue
                sample = (self._first + g) * self._size + index
                if self._episodes is not None:
                    self._episodes.begin(sample, group.prompt)
                self._request(sample, None if part is None else part.completion)
        return finished

    def _request(self, sample: int, carried: Completion | None) -> RolloutRequest:
        g, index = self._place(sample)
        group = self._groups[g]
        request = self._requests[sample] = RolloutRequest(
            request_id=sample,
            prompt_token_ids=group.prompt.token_ids,
            noise_key=self._noise.key(group, index),
            carried=carried,
        )
        return request

    def _place(self, sample: int) -> tuple[int, int]:
        """Number of a sample's group, and its own within that."""
        g, index = divmod(sample, self._size)
        return g - self._first, index

    def _poll(self, watch: StallWatch) -> None:
        with watch.call(NO_TOKEN):
            results = self._engine.poll()
        if not results:
            left = len(self._requests)
            raise RuntimeError(f"poll returned nothing, but {left} requests are unfinished")
        finished: list[Rollout] = []
        for result in results:
            rollout = self._take(result)
            if rollout is not None:
                finished.append(rollout)
        self._tell(finished)

    def _tell(self, finished: Sequence[Rollout]) -> None:
        try:
            for rollout in finished:
                self._on_finished(rollout)
        except Exception as error:  # a fault of the rewards is not the engine's
            raise _CallbackError(error) from error

    def _take_answers(self, *, wait: bool) -> list[RolloutRequest]:
        """Take what environments have answered; returns the requests that follow from it."""
        if self._episodes is None:
            return []
        try:
            answers = self._episodes.answers(wait=wait)
        except Exception as error:  # nor is one of the environments
            raise _CallbackError(error) from error
        further: list[RolloutRequest] = []
        for sample, completion, goes_on in answers:
            place = self._place(sample)
            self._state[place] = replace(self._state[place], completion=completion)
            if goes_on:
                further.append(self._request(sample, completion))
            else:
                self._tell([self._finish(*place)])
        return further

    def _take(self, result: FinishedCompletion) -> Rollout | None:
        """Check a completion and keep it; returns it where it is finished."""
        sample, completion = result.request_id, result.completion
        request = self._requests.pop(sample)
        self._num_returned += 1
        if result.policy_version != self._version:
            raise RuntimeError(
                f"rollout {sample} was made by policy version {result.policy_version}, "
                f"not {self._version}"
            )
        if not all(math.isfinite(x) for x in completion.logprobs):
            raise RuntimeError(f"rollout {sample} has log-probs that are not finite")
        n = request.num_carried
        if request.carried is not None and (
            completion.token_ids[:n] != request.carried.token_ids
            or completion.logprobs[:n] != request.carried.logprobs
        ):
            raise RuntimeError(f"rollout {sample} does not begin with the {n} tokens carried to it")
        g, index = self._place(sample)
        spans = self._state[g, index].policy_versions if (g, index) in self._state else ()
        goes_on = bool(spans) and spans[-1][1] == result.policy_version
        if len(completion.token_ids) > n and not goes_on:
            spans = (*spans, (n, result.policy_version))
        self._num_generated += len(completion.token_ids) - n
        if spans:
            self._state[g, index] = CarriedCompletion(completion=completion, policy_versions=spans)
        if completion.finish_reason == "abort":
            self._num_aborted += 1
            return None
        if self._episodes is not None and self._episodes.turn_ended(sample, completion):
            return None
        return self._finish(g, index)

    def _finish(self, g: int, index: int) -> Rollout:
        self._tail.finished(g)
        self._num_done += 1
        self._on_progress(self._num_done, len(self.own) * self._size)
        return self._rollout(g, index)

    # ---- what came of it ---------------------------------------------------------------------

    def rollouts(self, g: int) -> list[Rollout]:
        """The completions of a group, broken-off ones included."""
        return [self._rollout(g, index) for index in range(self._size)]

    def _rollout(self, g: int, index: int) -> Rollout:
        assert self._version is not None
        state = self._state.get((g, index), _NOTHING)
        versions = state.policy_versions or ((0, self._version),)
        sample = (self._first + g) * self._size + index
        completion, turns, fault = state.completion, (), ""
        if self._episodes is not None:
            turns, fault = self._episodes.turns(sample), self._episodes.fault(sample)
            # What environments say is not the model's: no reward may find it in its words.
            completion = replace(completion, text="\n".join(turn.text for turn in turns))
        return Rollout(
            group_id=self._first + g,
            sample_id=sample,
            prompt=self._groups[g].prompt,
            completion=completion,
            policy_version=versions[-1][1],
            policy_versions=versions,
            turns=turns,
            fault=fault,
        )

    def parts(self, g: int) -> tuple[CarriedCompletion | None, ...]:
        """What is there of a group, to be carried over."""
        return tuple(self._state.get((g, index)) for index in range(self._size))

    def outcome(self, *, carries: bool) -> dict[str, Any]:
        """Numbers of the groups that are used and carried on, and counts; plain values."""
        kept = set(self._tail.kept())
        carried = [g for g in self.own if carries and g not in kept and any(self.parts(g))]
        used = [self._rollout(g, i) for g in kept for i in range(self._size)]
        trained = [r for r in used if r.completion.finish_reason != "abort"]
        held = sum(self._num_tokens(g) for g in carried) + sum(map(_num_tokens, trained))
        old = [
            (next_start - start, self._lag(version))
            for rollout in trained
            for (start, version), next_start in _spans(rollout)
            if self._lag(version)
        ]
        return {
            "kept": sorted(kept),
            "carried": carried,
            "counts": {
                "num_generated_tokens": self._num_generated,
                "num_aborted": self._num_aborted,
                "num_tokens_dropped": sum(map(self._num_tokens, self.own)) - held,
                "num_tokens_resumed": sum(n for n, _ in old),
                "max_version_lag": max((lag for _, lag in old), default=0),
            },
        }

    def _num_tokens(self, g: int) -> int:
        return sum(len(part.completion.token_ids) for part in self.parts(g) if part is not None)

    def _lag(self, version: int) -> int:
        assert self._version is not None
        return self._version - version


def _num_tokens(rollout: Rollout) -> int:
    return len(rollout.completion.token_ids)


def _spans(rollout: Rollout) -> Iterator[tuple[tuple[int, int], int]]:
    """Each (first token, version) with the first token after the span."""
    versions = rollout.policy_versions
    ends = [start for start, _ in versions[1:]] + [_num_tokens(rollout)]
    return zip(versions, ends, strict=True)
