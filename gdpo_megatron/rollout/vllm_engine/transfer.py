"""Weights from the trainer to vLLM inside one process: the tensors themselves, nothing is sent.

vLLM's own life cycle of an update (start, update, finish) stays in charge. It takes each layer
apart, loads it as from a checkpoint and lays it out anew, which is what makes packed, fused and
quantised layers right; writing into a live model does not. Each rank of an engine sees all tensors
and takes its part. Source: vllm/distributed/weight_transfer/base.py, ipc_engine.py.
"""

# vLLM lives in an environment of its own, which pyright does not see.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

BACKEND = "gdpo_megatron"
"""Name under which vLLM knows it."""


@dataclass
class InProcessInit(WeightTransferInitInfo):
    """There is nothing to agree on."""


@dataclass
class InProcessUpdate(WeightTransferUpdateInfo):
    """One update.

    Args:
        tensors: (Hugging Face name, whole tensor), drawn once, in layer order. A layer's tensors
            are held until it is complete.
        shapes: of all that must come, by name.
    """

    tensors: Iterable[tuple[str, Tensor]]
    shapes: dict[str, tuple[int, ...]]


class InProcessTransfer(WeightTransferEngine[InProcessInit, InProcessUpdate]):
    """The worker's side, which is called by vLLM."""

    init_info_cls = InProcessInit
    update_info_cls = InProcessUpdate

    def init_transfer_engine(self, init_info: InProcessInit) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        """Take the layers apart."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: InProcessUpdate) -> None:
        """Load tensors as they are drawn; RuntimeError unless they are those of the shapes."""
        tensors = _checked(update_info)
        try:
            self.model.load_weights(tensors)
            for name, _ in tensors:
                raise RuntimeError(f"vLLM did not take weight {name}")
        except BaseException:
            # Layers stay apart otherwise, and the next update would add to what this one brought.
            finalize_layerwise_reload(self.model, self.model_config)
            raise

    def finish_weight_update(self) -> None:
        """Lay out what is left, and what shares a weight that another layer has loaded.

        vLLM 0.32 takes a tied output layer for one that got no weights and leaves it be. On a CPU,
        which packs the weights anew into a form of its own, it would answer with the old ones.
        """
        finalize_layerwise_reload(self.model, self.model_config)
        for layer in _tied_layers(self.model):
            layer.quant_method.process_weights_after_loading(layer)

    def shutdown(self) -> None:
        """Nothing to close."""


def _checked(update: InProcessUpdate) -> Iterator[tuple[str, Tensor]]:
    """The tensors as they pass: each of the model's once, in its shape."""
    missing = dict(update.shapes)
    for name, tensor in update.tensors:
        shape = missing.pop(name, None)
        if shape != tuple(tensor.shape):
            expected = "no such tensor, or not again" if shape is None else f"shape {shape}"
            raise RuntimeError(f"weight {name} of shape {tuple(tensor.shape)}: expected {expected}")
        yield name, tensor
    if missing:
        raise RuntimeError(f"{len(missing)} weights are missing: {[*missing][:3]}")


def _tied_layers(model: torch.nn.Module) -> Iterator[Any]:
    """Layers whose weight is another layer's."""
    seen: set[int] = set()
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and hasattr(layer, "quant_method"):
            if id(weight) in seen:
                yield layer
            seen.add(id(weight))


WeightTransferEngineFactory.register_engine(BACKEND, InProcessTransfer)
