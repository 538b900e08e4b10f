"""What `triton` is to a module of megatron.core that imports it without asking whether it is there.

Its kernels can be defined and not be started. Only the module in STAND_INS of megatron_cpu.py sees
this: the others find no triton and take their own way without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

constexpr = object
"""Annotation of kernel arguments."""


class _Kernel:
    def __init__(self, name: str):
        self._name = name

    def __getitem__(self, grid: Any) -> Any:
        raise RuntimeError(
            f"megatron.core starts the triton kernel {self._name}, which needs a GPU"
        )


def jit(function: Callable[..., Any]) -> _Kernel:
    """Stand in for `triton.jit`."""
    return _Kernel(function.__name__)
