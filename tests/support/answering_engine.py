"""A rollout engine that knows its completions by heart: `answers.json` in the model's folder.

The file maps the text of a prompt to a list of completions; which of them a request gets follows
from its noise key alone. A prompt that is not there gets nothing but an end token. Used as
`rollout.engine: ./answering_engine.py:answering_engine`; the weights are taken and not looked at.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from gdpo_megatron.data.tokenizer import Tokenizer
from gdpo_megatron.rollout.base import (
    EngineSetup,
    FinishedCompletion,
    RolloutRequest,
    SamplingParams,
)
from gdpo_megatron.types import Completion

ANSWERS_FILE = "answers.json"


class AnsweringEngine:
    """See above; one completion a poll, the last request first.

    Args:
        answers: text of a prompt -> completions.
        tokenizer: of the model.
    """

    def __init__(self, answers: Mapping[str, Sequence[str]], tokenizer: Tokenizer):
        self._answers, self._tokenizer = answers, tokenizer
        self._waiting: list[tuple[RolloutRequest, SamplingParams]] = []
        self.policy_version: int | None = None
        self.num_generated_tokens = 0
        self.num_asked = 0

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting)

    def submit(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> None:
        self._waiting += [(request, sampling) for request in requests]
        self.num_asked += len(requests)

    def poll(self) -> list[FinishedCompletion]:
        if not self._waiting:
            return []
        request, sampling = self._waiting.pop()
        prompt = self._tokenizer.decode(list(request.prompt_token_ids))
        known = self._answers.get(prompt) or [""]
        text = known[request.noise_key % len(known)]
        tokens = [*self._tokenizer.encode(text, add_special_tokens=False)]
        end = self._tokenizer.eos_token_id
        assert end is not None
        whole = len(tokens) < sampling.max_completion_tokens
        tokens = [*tokens, end][: sampling.max_completion_tokens]
        self.num_generated_tokens += len(tokens)
        completion = Completion(
            token_ids=tuple(tokens),
            logprobs=(-0.5,) * len(tokens),
            text=text if whole else self._tokenizer.decode(tokens),
            finish_reason="stop" if whole else "length",
        )
        assert self.policy_version is not None
        return [
            FinishedCompletion(
                request_id=request.request_id,
                completion=completion,
                policy_version=self.policy_version,
            )
        ]

    def abort(self, request_ids: Iterable[int]) -> None:
        assert not list(request_ids)

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        for _ in tensors:
            pass
        self.policy_version = version

    def sleep(self) -> None:
        self.policy_version = None

    def wake(self) -> None:
        pass


def answering_engine(setup: EngineSetup) -> AnsweringEngine:
    """The factory that a config names."""
    path: Path = setup.model_files / ANSWERS_FILE
    answers = json.loads(path.read_text()) if path.is_file() else {}
    return AnsweringEngine(answers, setup.tokenizer)
