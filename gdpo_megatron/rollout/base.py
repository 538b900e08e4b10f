"""The rollout protocol: what a trainer asks of an engine, whatever the engine is.

An engine holds a copy of the policy's weights under a version number. Requests go in, finished
completions come out as they finish, so that rewards can start while the rest is generated. All
ranks of one engine make the same calls with the same arguments in the same order.

    engine.wake(); engine.load_weights(policy.hf_tensors(), version=3)
    engine.submit(requests, sampling)
    while engine.num_unfinished: completions += engine.poll()
    engine.sleep()
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from gdpo_megatron.config.vllm import VllmConfig
from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.data.tokenizer import Tokenizer
from gdpo_megatron.distributed.mesh import EngineMesh
from gdpo_megatron.platform import Platform
from gdpo_megatron.registry import Registry
from gdpo_megatron.types import Completion


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn; see config.schema.SamplingConfig for the fields."""

    temperature: float
    top_p: float
    top_k: int
    max_completion_tokens: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]

    @classmethod
    def unrestricted(cls, num_tokens: int, temperature: float = 1.0) -> SamplingParams:
        """Of the model's whole distribution; every completion has `num_tokens` tokens."""
        return cls(
            temperature=temperature,
            top_p=1.0,
            top_k=0,
            max_completion_tokens=num_tokens,
            stop=(),
            stop_token_ids=(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """One completion that is wanted.

    `request_id` is unique among unfinished requests. Requests with equal `prompt_token_ids` may
    share their prefill. `noise_key` (see `noise_key`) fixes the sampling noise of every position.
    `carried` is what an earlier request made of the completion before it was aborted: generation
    goes on after it, at the next position of the noise. Its tokens count for the limits and for
    stop strings, and are part of the completion that comes back, with the log-probs given here.
    """

    request_id: int
    prompt_token_ids: tuple[int, ...]
    noise_key: int
    carried: Completion | None = None

    @property
    def num_carried(self) -> int:
        """Tokens of the completion that are there already."""
        return 0 if self.carried is None else len(self.carried.token_ids)

    @property
    def input_token_ids(self) -> tuple[int, ...]:
        """The prompt, and what is there of the completion."""
        return self.prompt_token_ids + (() if self.carried is None else self.carried.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedCompletion:
    """A completion, and the version of the weights that made it, `carried` tokens excepted."""

    request_id: int
    completion: Completion
    policy_version: int


class RolloutEngine(Protocol):
    """An engine that lives in the trainer's ranks."""

    policy_version: int | None
    """Version of the weights that are loaded; None before the first sync and while asleep."""

    num_generated_tokens: int
    """Tokens drawn since the engine was made; grows within `poll`, whatever thread looks."""

    @property
    def num_unfinished(self) -> int:
        """Requests that `poll` has not returned yet."""
        ...

    def submit(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> None:
        """Queue requests.

        Raises:
            RuntimeError: no weights are loaded.
            ValueError: an id is in use, a prompt or what is carried leaves no room, or unfinished
                requests were submitted with other sampling parameters. None of the requests is
                queued then.
        """
        ...

    def poll(self) -> list[FinishedCompletion]:
        """Generate until at least one request finishes; [] when there is none left."""
        ...

    def abort(self, request_ids: Iterable[int]) -> None:
        """End requests; `poll` returns them with finish_reason "abort" and what they have."""
        ...

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take new weights.

        Args:
            tensors: (Hugging Face name, whole tensor) of every tensor of the model, in layer order.
                None is written to before this returns; an engine holds none after it.
            version: of the policy that they come from.

        Raises:
            RuntimeError: requests are unfinished, or the tensors are not exactly the model's.
        """
        ...

    def sleep(self) -> None:
        """Give memory back: caches and weights. `wake` and a sync must follow before `submit`.

        Raises:
            RuntimeError: requests are unfinished.
        """
        ...

    def wake(self) -> None:
        """Take the memory for weights again; a second call does nothing."""
        ...


@runtime_checkable
class ReadableEngine(Protocol):
    """What an engine may have besides: it gives back the weights that it holds, for a check."""

    def resident_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor) of what is held as it came: not packed, not quantised.

        Called with weights loaded; all ranks of the engine draw all of it. A tensor is not used
        after the next is drawn.
        """
        ...


def noise_key(seed: int, stream: str, step: int, prompt: int, sample: int) -> int:
    """64-bit key of a completion's sampling noise.

    It names the completion, not the place where it is made, so a run does not depend on how
    prompts are spread over ranks and batches. `stream` keeps training and evaluation apart.
    """
    text = f"{seed}/{stream}/{step}/{prompt}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def generate(
    engine: RolloutEngine,
    requests: Sequence[RolloutRequest],
    sampling: SamplingParams,
    on_finished: Callable[[FinishedCompletion], None] | None = None,
) -> list[FinishedCompletion]:
    """Submit requests and wait for all; results in the order of the requests.

    `on_finished` is called for each completion as soon as it is there.
    """
    engine.submit(requests, sampling)
    done: dict[int, FinishedCompletion] = {}
    while engine.num_unfinished:
        for finished in engine.poll():
            done[finished.request_id] = finished
            if on_finished is not None:
                on_finished(finished)
    return [done[request.request_id] for request in requests]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSetup:
    """What an engine is made from.

    Args:
        arch: shape of the model.
        tokenizer: for text and stop strings.
        model_files: folder with the model's config.json.
        mesh: this rank's place among the engines.
        platform: where to run.
        dtype: of weights and cache.
        max_sequence_length: prompt and completion together.
        max_concurrent_sequences: completions that are decoded at a time.
        seed: of the run; equal on all ranks.
        vllm: settings of that engine.
    """

    arch: ModelArchitecture
    tokenizer: Tokenizer
    model_files: Path
    mesh: EngineMesh
    platform: Platform
    dtype: torch.dtype
    max_sequence_length: int
    max_concurrent_sequences: int
    seed: int
    vllm: VllmConfig


EngineFactory = Callable[[EngineSetup], RolloutEngine]
engines: Registry[EngineFactory] = Registry("rollout engine", "gdpo_megatron.engines")
