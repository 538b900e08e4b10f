"""Engines for tests: the native one on a model folder, and a scripted one that answers a table."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gdpo_megatron.rollout.engines  # noqa: F401  # registers them
from gdpo_megatron.config.vllm import VllmConfig
from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.hf_io import HFCheckpoint
from gdpo_megatron.conversion.mapping import hf_shapes
from gdpo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from gdpo_megatron.distributed.mesh import EngineMesh
from gdpo_megatron.platform import detect_platform
from gdpo_megatron.rollout.base import (
    EngineSetup,
    FinishedCompletion,
    RolloutEngine,
    RolloutRequest,
    SamplingParams,
    engines,
    noise_key,
)
from gdpo_megatron.rollout.native import NativeEngine
from gdpo_megatron.types import Completion, FinishReason
from support.ports import group_of_one

ONE_RANK = EngineMesh(replica=0, num_replicas=1, tp_rank=0, tp_size=1, tp_group=None)


def greedy(max_completion_tokens: int = 12, **fields: Any) -> SamplingParams:
    """Sampling parameters, greedy and without stops unless told otherwise."""
    defaults: dict[str, Any] = {
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "stop": (),
        "stop_token_ids": (),
    }
    return SamplingParams(max_completion_tokens=max_completion_tokens, **(defaults | fields))


def request(request_id: int, prompt: Sequence[int], key: int | None = None) -> RolloutRequest:
    """A request; its noise key follows from the id unless given."""
    return RolloutRequest(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        noise_key=noise_key(7, "test", 0, request_id, 0) if key is None else key,
    )


def drain(engine: RolloutEngine) -> dict[int, FinishedCompletion]:
    """Poll until nothing is left; every id comes once."""
    done: dict[int, FinishedCompletion] = {}
    while engine.num_unfinished:
        finished = engine.poll()
        assert finished, "poll returned nothing while requests are unfinished"
        for it in finished:
            assert it.request_id not in done
            done[it.request_id] = it
    return done


def folder_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder by name, in layer order."""
    arch = load_architecture(folder)
    reader = HFCheckpoint(folder, arch)
    return {name: reader.get(name) for name in hf_shapes(arch)}


def native_engine(
    folder: Path,
    *,
    mesh: EngineMesh = ONE_RANK,
    max_sequence_length: int = 128,
    max_concurrent_sequences: int = 64,
    tokenizer: Tokenizer | None = None,
    version: int | None = 0,
) -> NativeEngine:
    """The native engine on a model folder, with its weights loaded unless `version` is None."""
    platform = detect_platform()
    platform.setup(0)
    engine = NativeEngine(
        load_architecture(folder),
        tokenizer or load_tokenizer(folder),
        mesh=mesh,
        platform=platform,
        dtype=torch.float32,
        max_sequence_length=max_sequence_length,
        max_concurrent_sequences=max_concurrent_sequences,
    )
    if version is not None:
        engine.load_weights(folder_tensors(folder).items(), version)
    return engine


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone, as torchrun would have described it."""
    _store, described = group_of_one()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in described.items():
            patch.setenv(name, value)
        platform = detect_platform()
        platform.setup(0)
        torch.distributed.init_process_group(platform.backend)
        try:
            yield
        finally:
            # vLLM keeps what it made of the group, and would take it for the next one's.
            if "vllm.distributed.parallel_state" in sys.modules:
                sys.modules["vllm.distributed.parallel_state"].destroy_distributed_environment()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def engine_setup(folder: Path, **fields: Any) -> EngineSetup:
    """Setup of an engine on one rank, for a model folder."""
    defaults: dict[str, Any] = {
        "arch": load_architecture(folder),
        "tokenizer": load_tokenizer(folder),
        "model_files": folder,
        "mesh": ONE_RANK,
        "platform": detect_platform(),
        "dtype": torch.float32,
        "max_sequence_length": 128,
        "max_concurrent_sequences": 64,
        "seed": 1,
        "vllm": VllmConfig(kv_cache_gib=0.125),
    }
    return EngineSetup(**(defaults | fields))


@contextmanager
def vllm_engine(folder: Path, **fields: Any) -> Iterator[RolloutEngine]:
    """vLLM on a model folder, without weights, in a process group of its own."""
    with one_rank():
        engine = engines.get("vllm")(engine_setup(folder, **fields))
        yield engine
        engine.close()  # pyright: ignore[reportAttributeAccessIssue]


class ScriptedEngine:
    """A `RolloutEngine` whose answers stand in a table: one token per poll for each request.

    Args:
        answers: prompt -> the token ids of its completion; log-probs are -0.5 each.
        shapes: name -> shape of the tensors that a sync must bring.
        max_sequence_length: prompt and completion together.
    """

    def __init__(
        self,
        answers: Mapping[tuple[int, ...], tuple[int, ...]],
        shapes: Mapping[str, tuple[int, ...]],
        max_sequence_length: int,
    ):
        self._answers, self._shapes = answers, shapes
        self._max_length = max_sequence_length
        self._running: dict[int, tuple[RolloutRequest, int]] = {}
        self._finished: list[FinishedCompletion] = []
        self._sampling: SamplingParams | None = None
        self.policy_version: int | None = None
        self.num_generated_tokens = 0
        self.requests: list[RolloutRequest] = []  # all that were submitted, for tests to look at

    @property
    def num_unfinished(self) -> int:
        return len(self._running) + len(self._finished)

    def submit(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> None:
        if self.policy_version is None:
            raise RuntimeError("no weights are loaded")
        if self.num_unfinished and sampling != self._sampling:
            raise ValueError("other sampling parameters")
        ids = [r.request_id for r in requests]
        taken = {*self._running, *(f.request_id for f in self._finished)}
        if len(set(ids)) < len(ids) or taken & set(ids):
            raise ValueError("request_id is in use")
        if any(not 0 < len(r.prompt_token_ids) < self._max_length for r in requests):
            raise ValueError("the prompt does not fit")
        limits = [
            min(sampling.max_completion_tokens, self._max_length - len(r.prompt_token_ids))
            for r in requests
        ]
        if any(r.num_carried >= limit for r, limit in zip(requests, limits, strict=True)):
            raise ValueError("nothing is left to generate")
        self._sampling = sampling
        self._running |= {r.request_id: (r, r.num_carried) for r in requests}
        self.requests += requests

    def poll(self) -> list[FinishedCompletion]:
        while self._running and not self._finished:
            for request_id, (running, count) in list(self._running.items()):
                self._running[request_id] = (running, count + 1)
                self.num_generated_tokens += 1
                reason = self._end(running, count + 1)
                if reason is not None:
                    self._finish(request_id, reason)
        finished, self._finished = self._finished, []
        return finished

    def _end(self, running: RolloutRequest, count: int) -> FinishReason | None:
        assert self._sampling is not None
        prompt = running.prompt_token_ids
        if count == len(self._answers[prompt]):
            return "stop"
        room = min(self._sampling.max_completion_tokens, self._max_length - len(prompt))
        return "length" if count == room else None

    def _finish(self, request_id: int, reason: FinishReason) -> None:
        running, count = self._running.pop(request_id)
        assert self.policy_version is not None
        carried = running.carried.logprobs if running.carried else ()
        answer = self._answers[running.prompt_token_ids][running.num_carried : count]
        tokens = (*running.carried.token_ids, *answer) if running.carried else answer
        completion = Completion(
            token_ids=tokens,
            logprobs=carried + (-0.5,) * (count - len(carried)),
            text=" ".join(map(str, tokens)),
            finish_reason=reason,
        )
        self._finished.append(
            FinishedCompletion(
                request_id=request_id, completion=completion, policy_version=self.policy_version
            )
        )

    def abort(self, request_ids: Iterable[int]) -> None:
        for request_id in set(request_ids) & self._running.keys():
            self._finish(request_id, "abort")

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._refuse_unfinished()
        self.policy_version = None
        seen: set[str] = set()
        for name, tensor in tensors:
            if name in seen or self._shapes.get(name) != tuple(tensor.shape):
                raise RuntimeError(f"unexpected tensor {name}")
            seen.add(name)
        if seen != self._shapes.keys():
            raise RuntimeError("tensors missing")
        self.policy_version = version

    def sleep(self) -> None:
        self._refuse_unfinished()
        self.policy_version = None

    def wake(self) -> None:
        """There is no memory to take."""

    def _refuse_unfinished(self) -> None:
        if self.num_unfinished:
            raise RuntimeError(f"{self.num_unfinished} requests are unfinished")
