"""Context parallelism: each rank holds a part of every row, chosen so that causal work is even.

A row of S tokens is cut in 2 C pieces for C ranks; rank r holds pieces r and 2C - 1 - r. That is
Megatron's order, which its rotary positions and Transformer Engine's attention assume.

What is computed per token is gathered before it meets the loss, so that every rank has whole rows
and the same loss: sequence-level objectives need nothing of their own. A rank's gradient is then
that of its own tokens, and the sum over ranks, which the data-parallel reduction takes anyway, is
the gradient of all.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@lru_cache(maxsize=64)
def token_order(length: int, num_ranks: int) -> Tensor:
    """Positions of a row, rank by rank: int64 [length]; rank r has the r-th part of it.

    Args:
        length: tokens of the row, a multiple of 2 `num_ranks`.
        num_ranks: context-parallel ranks.
    """
    pieces = torch.arange(length).chunk(2 * num_ranks)
    return torch.cat(
        [piece for r in range(num_ranks) for piece in (pieces[r], pieces[2 * num_ranks - 1 - r])]
    )


def own_tokens(x: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's tokens of whole rows.

    Args:
        x: [b, S], S a multiple of 2 C.
        group: the context-parallel group of C ranks.

    Returns:
        [b, S / C].
    """
    if group.size() == 1:
        return x
    own = token_order(x.shape[1], group.size()).chunk(group.size())[group.rank()]
    return x[:, own.to(x.device)].contiguous()


class _GatherTokens(torch.autograd.Function):
    """All tokens in order, along dim 0. The gradient is one rank's alone, or the sum of all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, sum_gradients: bool) -> Tensor:
        size = group.size()
        order = token_order(x.shape[0] * size, size).to(x.device)
        gathered = x.new_empty((x.shape[0] * size, *x.shape[1:]))
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
        ctx.group, ctx.sum_gradients = group, sum_gradients
        ctx.save_for_backward(order)
        return gathered.index_select(0, order.argsort())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (order,) = ctx.saved_tensors
        grad = grad.index_select(0, order)
        if not ctx.sum_gradients:
            return grad.chunk(ctx.group.size())[ctx.group.rank()], None, None
        own = grad.new_empty((grad.shape[0] // ctx.group.size(), *grad.shape[1:]))
        dist.reduce_scatter_tensor(own, grad.contiguous(), group=ctx.group)
        return own, None, None


def gather_keys(x: Tensor, group: ProcessGroup) -> Tensor:
    """Keys or values of all tokens, [S / C, ...] -> [S, ...].

    Every rank attends to them with queries of its own, so their gradient is summed over ranks.
    """
    return _gather(x, group, True)


def gather_rows(x: Tensor, group: ProcessGroup) -> Tensor:
    """What was computed per token, [b, S / C] -> [b, S], for a loss that is equal on all ranks."""
    if group.size() == 1:
        return x
    return _gather(x.transpose(0, 1), group, False).transpose(0, 1)


def _gather(x: Tensor, group: ProcessGroup, sum_gradients: bool) -> Tensor:
    return _GatherTokens.apply(x, group, sum_gradients)  # pyright: ignore[reportReturnType]
