"""An engine around the native one: notes what is drawn, compares it with a record, replays it.

Steps are counted by weight syncs, and a completion is named by its step and request id, so that
no name depends on the rank that makes it. What a token was chosen by is noted where it is chosen:
`watched_draws` stands between the native engine and its sampler.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypedDict
from unittest import mock

import torch
from torch import Tensor

from gdpo_megatron.rollout.base import (
    FinishedCompletion,
    RolloutEngine,
    RolloutRequest,
    SamplingParams,
)
from gdpo_megatron.rollout.native import engine
from gdpo_megatron.rollout.native.sampler import perturbed_logits, split_keys
from gdpo_megatron.types import Completion

NUM_BEST = 8
"""Best perturbed logits that a record keeps of each token."""

Draws = dict[tuple[int, ...], list[Tensor]]
"""Noise key as the sampler has it -> perturbed logits [V] of each token of the completion."""


class Made(TypedDict):
    """A completion on record."""

    prompt: list[int]
    noise_key: int
    tokens: list[int]
    logprobs: list[float]
    text: str
    finish_reason: Any
    best_ids: Tensor
    """int32 [T, NUM_BEST], the tokens with the best perturbed logits."""
    best: Tensor
    """float32 [T, NUM_BEST], what these are."""


class Parting(TypedDict):
    """The first token at which a completion leaves the record."""

    step: int
    request_id: int
    position: int
    recorded_token: int
    token: int
    margin: float
    """By how much `token` is ahead of the recorded one, in this engine's perturbed logits."""
    recorded_margin: float
    """By how much it is behind in the record's; of a token that is not among the best there, by
    how much the last of these is."""


Record = list[dict[int, Made]]
"""For each step, request id -> what was made."""


@contextmanager
def watched_draws() -> Iterator[Draws]:
    """Note the perturbed logits of every token that native engines draw."""
    draws: Draws = defaultdict(list)
    sample = engine.sample

    def noting(
        logits: Tensor, noise: Any, keys: Tensor, positions: Tensor, **how: Any
    ) -> tuple[Tensor, Tensor]:
        rows, _ = perturbed_logits(logits, noise, keys, positions, **how)
        for key, position, row in zip(keys.tolist(), positions.tolist(), rows, strict=True):
            assert len(draws[tuple(key)]) == position
            draws[tuple(key)].append(row)
        return sample(logits, noise, keys, positions, **how)

    with mock.patch.object(engine, "sample", noting):
        yield draws


class WatchedEngine:
    """A `RolloutEngine` that hands everything on to a native one.

    Args:
        inner: the engine; what is not here is its.
        draws: see watched_draws.
        watches: by sampling parameters, which requests are meant; others pass unseen.
        record: what to compare with; None only notes.
        replay: return the record's completions; the engine decodes its share all the same.

    Attributes:
        made: what this engine has decoded, by step.
        partings: where that is not the record's.
    """

    def __init__(
        self,
        inner: RolloutEngine,
        draws: Draws,
        watches: Callable[[SamplingParams], bool],
        record: Record | None = None,
        replay: bool = False,
    ):
        self._inner, self._draws, self._watches = inner, draws, watches
        self._record, self._replay = record, replay
        self._asked: dict[int, RolloutRequest] = {}
        self.made: Record = []
        self.partings: list[Parting] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._inner.load_weights(tensors, version)
        self._draws.clear()
        self.made.append({})

    def submit(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> None:
        self._inner.submit(requests, sampling)
        if self._watches(sampling):
            self._asked |= {request.request_id: request for request in requests}

    def poll(self) -> list[FinishedCompletion]:
        return [
            self._seen(finished) if finished.request_id in self._asked else finished
            for finished in self._inner.poll()
        ]

    def _seen(self, finished: FinishedCompletion) -> FinishedCompletion:
        """Note a completion; returns it, or the record's in its place."""
        request = self._asked.pop(finished.request_id)
        (key,) = split_keys([request.noise_key], torch.device("cpu")).tolist()
        rows, completion = torch.stack(self._draws[tuple(key)]), finished.completion
        best = rows.topk(NUM_BEST, -1)
        self.made[-1][finished.request_id] = {
            "prompt": list(request.prompt_token_ids),
            "noise_key": request.noise_key,
            "tokens": list(completion.token_ids),
            "logprobs": list(completion.logprobs),
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "best_ids": best.indices.int(),
            "best": best.values,
        }
        if self._record is None:
            return finished
        step = len(self.made) - 1
        recorded = self._record[step][finished.request_id]
        if parting := _parting(recorded, completion.token_ids, rows):
            where: Any = {"step": step, "request_id": finished.request_id}
            self.partings.append(where | parting)
        if not self._replay:
            return finished
        assert recorded["prompt"] == list(request.prompt_token_ids)
        return replace(finished, completion=as_completion(recorded))


def as_completion(made: Made) -> Completion:
    """A completion on record as an engine returns it."""
    return Completion(
        token_ids=tuple(made["tokens"]),
        logprobs=tuple(made["logprobs"]),
        text=made["text"],
        finish_reason=made["finish_reason"],
    )


def _parting(recorded: Made, tokens: Sequence[int], rows: Tensor) -> Mapping[str, float] | None:
    """Where tokens leave the record, and how near a tie that is; rows are perturbed logits."""
    pairs = zip(recorded["tokens"], tokens, strict=False)
    position = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if position is None:
        # Equal tokens end for the same reason, so neither is longer than the other.
        assert len(tokens) == len(recorded["tokens"])
        return None
    theirs, token, row = recorded["tokens"][position], tokens[position], rows[position]
    best = recorded["best"][position].tolist()
    ids = recorded["best_ids"][position].tolist()
    return {
        "position": position,
        "recorded_token": theirs,
        "token": token,
        "margin": float(row[token] - row[theirs]),
        "recorded_margin": best[0] - (best[ids.index(token)] if token in ids else best[-1]),
    }
