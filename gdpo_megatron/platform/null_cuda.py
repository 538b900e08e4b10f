"""What `torch.cuda` is to megatron.core on a machine without CUDA.

CPU operations are finished when they return, so streams, events and synchronisation have nothing
left to do. Only what Megatron reaches on the paths we run is here; any other function raises, so
that a new dependency of Megatron on CUDA is seen at once instead of being absorbed.
"""

# ruff: noqa: D103 - each function is what its torch.cuda namesake is

from __future__ import annotations

import contextlib
from typing import Any

import torch


class Stream:
    """A stream or event: every ordering it could promise already holds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Stream) -> None: ...

    def wait_event(self, event: Stream) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record(self, *args: Any) -> None: ...

    def record_event(self, *args: Any) -> Stream:
        return self

    def query(self) -> bool:
        return True


Event = Stream
_STREAM = Stream()


def identity(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Stand in for `tensor.cuda(...)`."""
    return tensor


def current_device() -> torch.device:
    return torch.device("cpu")


def is_available() -> bool:
    return False


def device_count() -> int:
    return 1


def current_stream(*args: Any, **kwargs: Any) -> Stream:
    return _STREAM


default_stream = current_stream


def stream(_: Stream) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def synchronize(*args: Any, **kwargs: Any) -> None: ...


def empty_cache() -> None: ...


def set_device(*args: Any) -> None: ...


def get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def manual_seed(seed: int) -> None:
    torch.manual_seed(seed)


class nvtx:
    """Profiler ranges: none to mark."""

    @staticmethod
    def range_push(*args: Any) -> None: ...

    @staticmethod
    def range_pop(*args: Any) -> None: ...


def __getattr__(name: str) -> Any:
    if name[0].isupper():  # a type, named in annotations and isinstance tests
        return getattr(torch.cuda, name)
    raise AttributeError(
        f"megatron.core asks for torch.cuda.{name}, which gdpo_megatron does not redirect on CPU; "
        "add it to gdpo_megatron/platform/null_cuda.py with its CPU meaning"
    )
