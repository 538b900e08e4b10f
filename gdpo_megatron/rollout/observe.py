"""The points of a forward pass at which two implementations of a model can be laid side by side.

All families here are pre-norm decoders: a residual stream that attention and MLP of each layer add
to. A point is this stream after one of them, and what is made of it at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

EMBEDDING, FINAL_NORM, LOGITS = "embedding", "final norm", "logits"

OnValue = Callable[[str, Tensor], None]
"""Called with a point and what is there, [..., h] or for LOGITS [..., V]; not kept by the caller,
who may write to it afterwards."""

Take = Callable[[Any, Any], Tensor]
"""The value of a point, from a module's positional arguments and what it returned."""


def after_attention(layer: int) -> str:
    """The stream after a layer's attention."""
    return f"layer {layer} attention"


def after_mlp(layer: int) -> str:
    """The stream after a layer, whose MLP (or experts) comes last."""
    return f"layer {layer} mlp"


@runtime_checkable
class ObservableEngine(Protocol):
    """What an engine may have besides: it lets its forward passes be watched."""

    def observed(self, on_value: OnValue) -> AbstractContextManager[None]:
        """Within, what every point has is reported as it is computed, in order of the tokens.

        Called with weights loaded and no request unfinished. What was computed before is computed
        again: no cache of prompts is used. A pass over several requests is not told apart, so one
        is submitted at a time. FINAL_NORM may have, and LOGITS has, the last token of each pass
        alone, from which the next is drawn.
        """
        ...


def returned(_: Any, output: Any) -> Tensor:
    """What a module returned, or the first of it."""
    return output[0] if isinstance(output, tuple) else output


def given(inputs: Any, _: Any) -> Tensor:
    """What a module was given first."""
    return inputs[0]


@contextmanager
def hooked(points: Mapping[str, tuple[torch.nn.Module, Take]], on_value: OnValue) -> Iterator[None]:
    """Report points of a model made of modules, by forward hooks."""

    def hook_of(point: str, take: Take) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            on_value(point, take(inputs, output))

        return hook

    handles = [
        module.register_forward_hook(hook_of(point, take))
        for point, (module, take) in points.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
