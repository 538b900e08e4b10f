"""A world of any size in one process: nothing is computed, nothing is sent, all of it is recorded.

Ranks are torch's "fake" process groups, floating point tensors torch's fake ones: they have shapes,
dtypes and storages without memory. Numbers that decide what is computed stay real, so that
Megatron's own code runs as it is: token ids, lengths, splits. Rules of the two kinds:

    integers that are created, and what is computed of integers alone, are real
    whatever a fake tensor takes part in is fake
    a number that is read of a fake tensor is 1

What a peer would have said is what this rank would say: a shape that comes down the pipeline is
that of the run's only shape, and experts get equal numbers of tokens.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from gdpo_megatron.platform.cpu import CpuPlatform

BACKEND = "fake"


class FakePlatform(CpuPlatform):
    """The CPU's Megatron over a process group that sends nothing."""

    name = "dry run"
    backend = BACKEND
    # As of the machine that the run is meant for: nothing is gathered here.
    gathers_uneven_parts = True

    def setup(self, local_rank: int) -> None:
        """The world is there already, see `fake_world`."""


@dataclass(frozen=True, slots=True, order=True)
class Message:
    """One kind of communication of a rank.

    Args:
        kind: all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, send, recv, barrier.
        group: global ranks that take part; of send and recv the other one alone.
        num_bytes: what the call is about: the whole tensor of all_reduce, broadcast, send and
            recv; what is gathered, or what is scattered, of all_gather and reduce_scatter; what
            this rank sends of all_to_all.
    """

    kind: str
    group: tuple[int, ...]
    num_bytes: int


_KINDS: dict[str, tuple[str, int]] = {
    # op -> (kind, which list or tensor of its arguments is counted)
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "alltoall_": ("all_to_all", 1),
    "alltoall_base_": ("all_to_all", 1),
    "gather_": ("gather", 0),
    "scatter_": ("scatter", 1),
    "send": ("send", 0),
    "recv_": ("recv", 0),
    "barrier": ("barrier", 0),
}


class World(TorchDispatchMode):
    """What happens in a fake world; see `fake_world`."""

    def __init__(self, rank: int, world_size: int):
        super().__init__()
        self.rank, self.world_size = rank, world_size
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.messages: Counter[Message] = Counter()
        """How often each was there since `forget`."""
        self.pipeline_shape: tuple[int, ...] | None = None
        """What a stage is told of the tensor that comes next."""
        self.live_bytes = self.peak_bytes = 0
        """Of fake tensors: now, and at most since `forget`."""
        self._storages: dict[int, Any] = {}

    def forget(self) -> None:
        """Start to record anew."""
        self.messages.clear()
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors_of((*args, *kwargs.values())))
        if func.namespace == "c10d":
            return self._communicate(func, args, kwargs, tensors)
        fakes = [x for x in tensors if isinstance(x, FakeTensor)]
        if not fakes and (tensors or _makes_integers(func, args, kwargs)):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if fakes and func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        if fakes and func is torch.ops.aten.masked_select.default:
            return self._masked_select(*args)
        out = func(*args, **kwargs)
        self._watch(out)
        return out

    def _masked_select(self, x: Tensor, mask: Tensor) -> Tensor:
        assert not isinstance(mask, FakeTensor), "how many are selected is not known"
        with unset_fake_temporarily():
            count = int(mask.expand(torch.broadcast_shapes(x.shape, mask.shape)).sum())
        return x.new_empty(count)

    # ---- memory ------------------------------------------------------------------------------

    def _watch(self, out: Any) -> None:
        for tensor in _tensors_of((out,)):
            if not isinstance(tensor, FakeTensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._storages:
                continue
            size = storage.nbytes()
            self._storages[key] = weakref.ref(storage, lambda _, k=key, n=size: self._freed(k, n))
            self.live_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _freed(self, key: int, size: int) -> None:
        del self._storages[key]
        self.live_bytes -= size

    # ---- messages ----------------------------------------------------------------------------

    def _communicate(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        name = func._schema.name.split("::")[1]
        kind, place = _KINDS[name]
        counted = list(_tensors_of((args[place],)))
        group = next(dist.ProcessGroup.unbox(x) for x in args if _is_group(x))
        ranks = tuple(dist.get_process_group_ranks(group))
        if kind in ("send", "recv"):
            ranks = (ranks[args[2]],)
        num_bytes = 0 if kind == "barrier" else sum(x.nbytes for x in counted)
        self.messages[Message(kind, ranks, num_bytes)] += 1
        if any(isinstance(x, FakeTensor) for x in tensors):
            return _unsent(func, args)
        with unset_fake_temporarily():
            out = func(*args, **kwargs)
        if kind == "recv" and counted[0].dtype == torch.int64:
            assert self.pipeline_shape is not None and counted[0].numel() == 3
            with unset_fake_temporarily():
                counted[0].copy_(torch.tensor(self.pipeline_shape))
        return out


def _tensors_of(values: Iterable[Any]) -> Iterator[Tensor]:
    """All tensors in arguments of an operation; torch's own way through trees takes longer."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_of(value)


class _ReadAsOnes(TorchFunctionMode):
    """Reads of fake tensors that torch does not hand to a dispatch mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist and isinstance(args[0], FakeTensor):
            return _ones(tuple(args[0].shape))
        if func is torch.tensor and any(isinstance(x, FakeTensor) for x in tree_leaves(args[0])):
            args = (tree_map(lambda x: 1.0 if isinstance(x, FakeTensor) else x, args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


def _ones(shape: tuple[int, ...]) -> Any:
    return [_ones(shape[1:]) for _ in range(shape[0])] if shape else 1.0


def _makes_integers(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation without tensors makes an integer tensor."""
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return not dtype.is_floating_point and not dtype.is_complex
    name = func._schema.name
    return name == "aten::arange" and all(isinstance(x, int) for x in args)


def _is_group(value: Any) -> bool:
    if not isinstance(value, torch.ScriptObject):
        return False
    kind: Any = value._type()
    return "ProcessGroup" in kind.name()


def _unsent(func: Any, args: Any) -> Any:
    work = FakeWork().boxed()
    return work if len(func._schema.returns) == 1 else (args[0], work)


# ---- the world -----------------------------------------------------------------------------------


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[World]:
    """Be `rank` of a world of `world_size` ranks within.

    Megatron's groups are built by the caller as ever, with a FakePlatform, and taken down here. The
    process must have no process group of its own.
    """
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import router

    new_group, route = dist.new_group, router.topk_routing_with_score_function

    def new_fake_group(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **(kwargs | {"backend": BACKEND}))  # Megatron asks for others too

    def route_evenly(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        probs, routing_map = route(*args, **kwargs)
        return probs, _even_map(*routing_map.shape, kwargs["topk"] if "topk" in kwargs else args[1])

    def gather_own(found: list[Any], own: Any, group: Any = None) -> None:
        found[:] = [own] * len(found)

    patches = (
        mock.patch.object(dist, "all_gather_object", gather_own),
        mock.patch.object(dist, "new_group", new_fake_group),
        mock.patch.object(router, "topk_routing_with_score_function", route_evenly),
        mock.patch.object(torch.nn.Module, "_apply", _apply),
    )
    dist.init_process_group(BACKEND, rank=rank, world_size=world_size, store=FakeStore())
    world = World(rank, world_size)
    try:
        with patches[0], patches[1], patches[2], patches[3], world.fake, world, _ReadAsOnes():
            yield world
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@functools.lru_cache(maxsize=8)
def _even_map(num_tokens: int, num_experts: int, top_k: int) -> Tensor:
    """Which experts each token goes to, so that all have equally many: bool [tokens, experts]."""
    tokens = torch.arange(num_tokens)[:, None]
    experts = (tokens * top_k + torch.arange(top_k)) % num_experts
    chosen = torch.zeros(num_tokens, num_experts, dtype=torch.bool)
    return chosen.scatter_(1, experts, torch.ones_like(experts, dtype=torch.bool))


def _apply(module: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
    """torch's, which exchanges tensors that something refers to weakly, as fake ones are."""
    for child in module.children() if recurse else ():
        _apply(child, fn)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        with torch.no_grad():
            applied = fn(parameter)
        if applied is not parameter:
            new = torch.nn.Parameter(applied, parameter.requires_grad)
            vars(new).update(vars(parameter))
            module._parameters[name] = new
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module
