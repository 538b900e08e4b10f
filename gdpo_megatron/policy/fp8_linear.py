"""Megatron's column- and row-parallel linear layers, multiplying in FP8.

    y  = x W^T       x in e4m3, W in e4m3
    dx = dy W        dy in e5m2, W in e4m3
    dW = dy^T x      dy in e5m2, x in e4m3

What Megatron's layers do around the product stays theirs (the row-parallel sum, biases, state,
checkpoints); `_forward_impl` is the product itself together with the column-parallel communication
that overlaps it, and that is replaced. Under sequence parallelism the 8-bit tokens are gathered,
not the tokens: a half or a quarter of the bytes, for the same values, because the scale is that of
the tokens of all ranks.

Only `x` in 8 bits is kept for the backward pass. The weight is rounded again there: rounded copies
would be as many as there are micro-batches under way.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.distributed import ProcessGroup

from gdpo_megatron.config.fp8 import Fp8Config
from gdpo_megatron.policy.fp8 import (
    E4M3,
    E5M2,
    Fp8Tensor,
    amaxes,
    quantize,
    scaled_matmul,
)


@dataclass(slots=True)
class Fp8Mode:
    """What the FP8 layers of a model share.

    Args:
        config: the `precision.fp8` section.
        group: the tensor- and context-parallel ranks, which share every tensor's scale.
        active: False makes them Megatron's own layers, until it is True again.
    """

    config: Fp8Config
    group: ProcessGroup | None
    active: bool = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Fp8Mode:
        """Copies of a layer's spec are layers of the same model."""
        return self


@dataclass(frozen=True, slots=True)
class ProductLayout:
    """How ranks share a product; by default they do not.

    Args:
        scale_group: ranks that have a part of x or of the weight.
        tp_group: ranks that tokens are gathered from, and dx is summed over.
        tokens_cut: x has this rank's tokens only, dx gets only theirs (sequence parallelism).
        sum_dx: the weight is cut by columns and x is not.
    """

    scale_group: ProcessGroup | None = None
    tp_group: ProcessGroup | None = None
    tokens_cut: bool = False
    sum_dx: bool = False


_WHOLE = ProductLayout()


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layout: ProductLayout) -> Tensor:
        amax = amaxes(x, weight, group=layout.scale_group)
        rows = quantize(x.reshape(-1, x.shape[-1]), E4M3, amax[0])
        w = quantize(weight, E4M3, amax[1])
        kept = rows if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(
            weight, amax[1], *((kept.values, kept.inverse_scale) if kept is not None else ())
        )
        ctx.layout, ctx.shape = layout, x.shape
        if layout.tokens_cut:
            rows, _ = _gather(rows, layout, wait=True)
        return scaled_matmul(rows, w.t(), x.dtype).view(-1, *x.shape[1:-1], weight.shape[0])

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor | None, None]:
        weight, amax_weight, *kept = ctx.saved_tensors
        layout: ProductLayout = ctx.layout
        grad = grad.reshape(-1, grad.shape[-1])
        g = quantize(grad, E5M2, amaxes(grad, group=layout.scale_group)[0])
        rows, gathered = Fp8Tensor(*kept) if kept else None, None
        if rows is not None and layout.tokens_cut:
            rows, gathered = _gather(rows, layout, wait=False)
        w = quantize(weight, E4M3, amax_weight)
        dx = scaled_matmul(g, w.transposed().t(), grad.dtype)
        summed = None
        if layout.tokens_cut:
            own = dx.new_empty(math.prod(ctx.shape[:-1]), dx.shape[1])
            summed = dist.reduce_scatter_tensor(own, dx, group=layout.tp_group, async_op=True)
        else:
            own = dx
            if layout.sum_dx:
                summed = dist.all_reduce(dx, group=layout.tp_group, async_op=True)
        dw = None
        if rows is not None:
            if gathered is not None:
                gathered.wait()
            # The tokens are what is summed over here, and their number is anything.
            columns = rows.pad_rows().transposed().t()
            dw = scaled_matmul(g.pad_rows().transposed(), columns, weight.dtype)
        if summed is not None:
            summed.wait()
        return own.view(ctx.shape), dw, None


def _gather(rows: Fp8Tensor, layout: ProductLayout, *, wait: bool) -> tuple[Fp8Tensor, Any]:
    """Tokens of all ranks in their order, and what to wait for before they are there."""
    group = layout.tp_group
    assert group is not None
    values = rows.values.view(torch.uint8)  # collectives know no 8-bit floats
    whole = values.new_empty(len(values) * group.size(), values.shape[1])
    work = dist.all_gather_into_tensor(whole, values, group=group, async_op=not wait)
    return Fp8Tensor(whole.view(rows.values.dtype), rows.inverse_scale), work


def fp8_product(x: Tensor, weight: Tensor, layout: ProductLayout = _WHOLE) -> Tensor:
    """X W^T in FP8, with its gradients in FP8.

    Args:
        x: [..., in], float32 or bfloat16.
        weight: [out, in]; in and out are multiples of 16.
        layout: how ranks share it.

    Returns:
        [..., out] in the dtype of x.
    """
    y: Any = _Fp8Product.apply(x, weight, layout)
    return y


def _product(layer: Any, fp8: Fp8Mode, plain: Any, arguments: Mapping[str, Any]) -> Tensor:
    """`_forward_impl` of both layers; `plain` is Megatron's."""
    if not fp8.active:
        return plain(**arguments)
    assert not arguments["gradient_accumulation_fusion"]
    assert arguments["grad_output_buffer"] is None
    layout = ProductLayout(
        scale_group=fp8.group,
        tp_group=layer.tp_group,
        tokens_cut=arguments["sequence_parallel"],
        sum_dx=arguments["allreduce_dgrad"],
    )
    y = fp8_product(arguments["input"], arguments["weight"], layout)
    return y if arguments["bias"] is None else y + arguments["bias"]


class Fp8ColumnParallelLinear(ColumnParallelLinear):
    """Megatron's layer with its product in FP8.

    Args:
        fp8: of the model.
        *args: as of Megatron's layer.
        **kwargs: as of Megatron's layer.
    """

    def __init__(self, *args: Any, fp8: Fp8Mode, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.fp8 = fp8

    def _forward_impl(self, **arguments: Any) -> Tensor:
        return _product(self, self.fp8, super()._forward_impl, arguments)


class Fp8RowParallelLinear(RowParallelLinear):
    """Megatron's layer with its product in FP8; arguments as of Fp8ColumnParallelLinear."""

    def __init__(self, *args: Any, fp8: Fp8Mode, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.fp8 = fp8

    def _forward_impl(self, **arguments: Any) -> Tensor:
        return _product(self, self.fp8, super()._forward_impl, arguments)


LINEARS: Mapping[tuple[str, str], tuple[type, type]] = {
    ("scaled_mm", "tensorwise"): (Fp8ColumnParallelLinear, Fp8RowParallelLinear),
}
"""(backend, recipe) -> column- and row-parallel layer."""


def fp8_layer_spec(spec: ModuleSpec, fp8: Fp8Mode) -> ModuleSpec:
    """A copy of a dense layer's local spec whose four linear layers multiply in FP8."""
    column, row = LINEARS[fp8.config.backend, fp8.config.recipe]
    layer: Any = copy.deepcopy(spec)
    attention = layer.submodules.self_attention.submodules
    mlp = layer.submodules.mlp.submodules
    attention.linear_qkv = ModuleSpec(module=column, params={"fp8": fp8})
    attention.linear_proj = ModuleSpec(module=row, params={"fp8": fp8})
    mlp.linear_fc1 = ModuleSpec(module=column, params={"fp8": fp8})
    mlp.linear_fc2 = ModuleSpec(module=row, params={"fp8": fp8})
    return layer


def is_fp8_layer(fp8: Fp8Config, layer: int, num_layers: int) -> bool:
    """Whether a layer, counted from 0 over the whole model, multiplies in FP8."""
    first = fp8.num_first_layers_in_params_dtype
    return first <= layer < num_layers - fp8.num_last_layers_in_params_dtype
