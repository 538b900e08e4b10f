"""Ways to spoil a weight sync, each with the check that must see it; for any engine.

A sabotage is put into one sync of a policy whose weights have changed since the last one. The table
says which check sees it when all are on, and which one when there are no checksums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gdpo_megatron.conversion.layouts import QKV
from gdpo_megatron.policy.weight_stream import WeightStream
from gdpo_megatron.rollout.base import FinishedCompletion, RolloutRequest, SamplingParams

Named = tuple[str, Tensor]
QUERY = "model.layers.0.self_attn.q_proj.weight"
GATE, UP = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


class Wrapped:
    """An engine around another one, whose calls go through."""

    def __init__(self, engine: Any):
        self.inner = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Skipping(Wrapped):
    """Draws all tensors, takes none, and says that it has the new version."""

    def load_weights(self, tensors: Iterable[Named], version: int) -> None:
        for _ in tensors:
            pass
        self.inner.policy_version = version


class TakesNothing(Wrapped):
    """Says that it has the new version and draws nothing."""

    def load_weights(self, tensors: Iterable[Named], version: int) -> None:
        self.inner.policy_version = version


class KeepsVersion(Wrapped):
    """Takes the weights but not their version."""

    def load_weights(self, tensors: Iterable[Named], version: int) -> None:
        self.inner.load_weights(tensors, version - 1)


class Stale(Wrapped):
    """Answers a prompt that it has seen as it did then, under the new version.

    It is put around an engine before the sync that is right, and stays there.
    """

    def __init__(self, engine: Any):
        super().__init__(engine)
        self._seen: dict[tuple[tuple[int, ...], int], FinishedCompletion] = {}
        self._waiting: dict[int, tuple[tuple[int, ...], int]] = {}
        self._ready: list[FinishedCompletion] = []

    @property
    def num_unfinished(self) -> int:
        return self.inner.num_unfinished + len(self._ready)

    def submit(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> None:
        keys = {r.request_id: (r.prompt_token_ids, r.noise_key) for r in requests}
        fresh = [r for r in requests if keys[r.request_id] not in self._seen]
        for request_id in keys.keys() - {r.request_id for r in fresh}:
            old = self._seen[keys[request_id]]
            version = self.inner.policy_version
            self._ready.append(replace(old, request_id=request_id, policy_version=version))
        self._waiting = keys
        self.inner.submit(fresh, sampling)

    def poll(self) -> list[FinishedCompletion]:
        if self._ready:
            ready, self._ready = self._ready, []
            return ready
        finished = self.inner.poll()
        self._seen |= {self._waiting[it.request_id]: it for it in finished}
        return finished


class KeepsPrefixCache(Wrapped):
    """vLLM whose cache still has the old weights' entries after a sync."""

    def load_weights(self, tensors: Iterable[Named], version: int) -> None:
        with mock.patch.object(self.inner._llm, "reset_prefix_cache", return_value=True):
            self.inner.load_weights(tensors, version)


class KeepsPackedOutputLayer(Wrapped):
    """vLLM as it is on a CPU: an output layer that is tied keeps the old weights in packed form."""

    def load_weights(self, tensors: Iterable[Named], version: int) -> None:
        from gdpo_megatron.rollout.vllm_engine import transfer

        with mock.patch.object(transfer, "_tied_layers", lambda _: iter(())):
            self.inner.load_weights(tensors, version)


def _stream(change: Callable[[list[Named]], Iterable[Named]]) -> Callable[[Any], Any]:
    """Change what the policy yields."""

    def spoil(policy: Any) -> AbstractContextManager[Any]:
        original = policy.hf_tensors

        def changed(*args: Any) -> Iterator[Named]:
            yield from change([(name, x.clone()) for name, x in original(*args)])

        return mock.patch.object(policy, "hf_tensors", changed)

    return spoil


def _swapped(tensors: list[Named]) -> Iterable[Named]:
    values = dict(tensors)
    values[GATE], values[UP] = values[UP], values[GATE]
    return values.items()


def _one_bit(tensors: list[Named]) -> Iterable[Named]:
    last = dict(tensors)[DOWN].view(-1).view(torch.uint8)
    last[-1] ^= 1 << 6  # the exponent of the last element; little endian
    return tensors


def _transposed_columns(tensors: list[Named]) -> Iterable[Named]:
    down = dict(tensors)[DOWN]
    down[:, [0, 1]] = down[:, [1, 0]]
    return tensors


def wrong_heads(_: Any) -> AbstractContextManager[Any]:
    """Queries, keys and values as if they lay one after the other."""

    def split(self: QKV, full: Tensor, arch: Any) -> list[Tensor]:
        d, groups = arch.head_dim, arch.num_key_value_heads
        return list(full.split([arch.num_attention_heads * d, groups * d, groups * d]))

    return mock.patch.object(QKV, "split", split)


@contextmanager
def _wrong_ranks(_: Any) -> Iterator[None]:
    """TP ranks' shards in the wrong order."""
    original = WeightStream._gathered

    def gathered(self: WeightStream, *args: Any) -> Tensor:
        return original(self, *args).flip(0)

    with mock.patch.object(WeightStream, "_gathered", gathered):
        yield


@contextmanager
def _not_a_number(policy: Any) -> Iterator[None]:
    """In one element of one parameter, on the rank that holds it."""
    held = [p for row, p in policy.stage_rows if DOWN in row.hf]
    with torch.no_grad():
        for parameter in held:
            parameter.view(-1)[-1] = float("nan")
    yield


@contextmanager
def _one_replica(policy: Any) -> Iterator[None]:
    """One data-parallel rank has learned something else."""
    if policy.mesh.dp_rank == 1:
        with torch.no_grad():
            policy.stage_rows[0][1].mul_(1.5)
    yield


@dataclass(frozen=True)
class Sabotage:
    """One way.

    Args:
        seen_by: the check, with all checks on.
        without_checksums: the check when there are none; None where none is claimed.
        names: what the message must name.
        policy: spoils the policy's side during the sync.
        engine: spoils the engine's.
        layouts: where it can happen; None means in all.
        from_the_first: the engine is spoilt before the sync that is right.
    """

    seen_by: str
    without_checksums: str | None
    names: str = ""
    policy: Callable[[Any], AbstractContextManager[Any]] = lambda _: nullcontext()
    engine: Callable[[Any], Any] = lambda engine: engine
    layouts: tuple[str, ...] | None = None
    from_the_first: bool = False


SABOTAGES: dict[str, Sabotage] = {
    "dropped": Sabotage(
        "completeness",
        "completeness",
        f"expected '{UP}'",
        policy=_stream(lambda tensors: [it for it in tensors if it[0] != UP]),
    ),
    "last_dropped": Sabotage(
        "completeness", "completeness", "did not come", policy=_stream(lambda them: them[:-1])
    ),
    "doubled": Sabotage(
        "completeness",
        "completeness",
        "expected nothing more",
        policy=_stream(lambda tensors: [*tensors, tensors[-1]]),
    ),
    "other_dtype": Sabotage(
        "completeness",
        "completeness",
        GATE,
        policy=_stream(lambda tensors: [(n, x.double() if n == GATE else x) for n, x in tensors]),
    ),
    "swapped": Sabotage("checksum", "canary", GATE, policy=_stream(_swapped)),
    "one_bit": Sabotage("checksum", "canary", DOWN, policy=_stream(_one_bit)),
    "columns_swapped": Sabotage("checksum", "canary", DOWN, policy=_stream(_transposed_columns)),
    "qkv_interleaved": Sabotage("checksum", "canary", QUERY, policy=wrong_heads),
    "ranks_swapped": Sabotage("checksum", "canary", QUERY, policy=_wrong_ranks, layouts=("tp2",)),
    "not_a_number": Sabotage("finite", "finite", DOWN, policy=_not_a_number),
    "replicas": Sabotage("replicas", None, "embed_tokens", policy=_one_replica, layouts=("dp2",)),
    "skipped": Sabotage("resident", "canary", QUERY, engine=Skipping),
    "nothing_taken": Sabotage("version", "version", "took 0 of", engine=TakesNothing),
    "old_version": Sabotage("version", "version", "has version 1", engine=KeepsVersion),
    "stale_cache": Sabotage(
        "canary", "canary", "completion token", engine=Stale, from_the_first=True
    ),
}

OF_ENGINE: dict[str, dict[str, Sabotage]] = {
    "vllm": {
        "stale_prefix_cache": Sabotage("canary", "canary", engine=KeepsPrefixCache),
        "tied_output_layer": Sabotage("canary", "canary", engine=KeepsPackedOutputLayer),
    }
}
"""More ways, which an engine has."""
