"""Log-probability and entropy of tokens from vocabulary-parallel logits.

Each TP rank holds a slice of the vocabulary. Two all-reduces of token size (a maximum, then one
packed sum) give every rank the exact values; the vocabulary is never gathered. Only the logits
themselves are kept for the backward pass, which recomputes the probabilities; in chunks, not even
they are, but the hidden states that they come from:

    d logp / d x_i = ([i = target] - p_i) / temperature
    d H    / d x_i = -p_i (log p_i + H) / temperature

Megatron's fused cross entropy rounds its gradient to bfloat16 and gives no entropy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def _scaled(logits: Tensor, temperature: float, num_valid: int) -> Tensor:
    """float32 logits / temperature, with the vocabulary's padding out of the softmax."""
    x = logits.float()
    x = x / temperature if temperature != 1.0 else x.clone()
    x[..., num_valid:] = float("-inf")
    return x


@dataclass(frozen=True, slots=True)
class _Softmax:
    """How the logits of a rank become probabilities.

    Args:
        temperature: divides the logits.
        first_id: of this rank's slice of the vocabulary.
        num_valid: columns of the slice that are no padding.
        group: the TP group; None where the slice is all.
    """

    temperature: float
    first_id: int
    num_valid: int
    group: ProcessGroup | None

    def forward(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """(logprobs, entropy, maximum, log_sum) of tokens, each float32 [...]."""
        x = _scaled(logits, self.temperature, self.num_valid)
        maximum = x.amax(-1)
        if self.group is not None:
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=self.group)
        x -= maximum.unsqueeze(-1)
        local, elsewhere = self._local(targets, x.shape[-1])
        target_logit = x.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0.0)
        weights = x.exp()
        x[..., self.num_valid :] = 0.0  # their weight is 0, and 0 * -inf is not
        packed = torch.stack([weights.sum(-1), x.mul_(weights).sum(-1), target_logit])
        if self.group is not None:
            dist.all_reduce(packed, group=self.group)
        sum_weights, sum_weighted, target_logit = packed.unbind(0)
        log_sum = sum_weights.log()
        entropy = log_sum - sum_weighted / sum_weights
        # maximum and log_sum stay apart: their sum would be rounded where logits are large.
        return target_logit - log_sum, entropy, maximum, log_sum

    def backward(
        self,
        logits: Tensor,
        targets: Tensor,
        entropy: Tensor,
        maximum: Tensor,
        log_sum: Tensor,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
    ) -> Tensor:
        """Gradient of the logits, in their dtype; two float32 tensors of their shape at a time."""
        log_p = _scaled(logits, self.temperature, self.num_valid)
        log_p -= maximum.unsqueeze(-1)
        log_p -= log_sum.unsqueeze(-1)
        p = log_p.exp()
        if grad_entropy is not None:
            log_p[..., self.num_valid :] = 0.0
            log_p.add_(entropy.unsqueeze(-1)).mul_(p).mul_(grad_entropy.unsqueeze(-1))
        if grad_logprobs is None:
            grad = log_p.neg_() if grad_entropy is not None else p.zero_()
        else:
            local, elsewhere = self._local(targets, p.shape[-1])
            grad = p.neg_().mul_(grad_logprobs.unsqueeze(-1))
            own = grad_logprobs.masked_fill(elsewhere, 0.0)
            grad.scatter_add_(-1, local.unsqueeze(-1), own.unsqueeze(-1))
            if grad_entropy is not None:
                grad -= log_p
        return grad.div_(self.temperature).to(logits.dtype)

    def _local(self, targets: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Columns of the targets, and which of them are another rank's."""
        local = targets - self.first_id
        elsewhere = (local < 0) | (local >= width)
        return local.masked_fill(elsewhere, 0), elsewhere


class _OfLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, softmax: _Softmax
    ) -> tuple[Tensor, Tensor]:
        logprobs, *rest = softmax.forward(logits, targets)
        ctx.save_for_backward(logits, targets, *rest)
        # The gradient of an unused result then comes as None, and its part is not computed.
        ctx.set_materialize_grads(False)
        ctx.softmax = softmax
        return logprobs, rest[0]

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor, None, None]:
        grad = ctx.softmax.backward(*ctx.saved_tensors, grad_logprobs, grad_entropy)
        return grad, None, None


class _OfHidden(torch.autograd.Function):
    """The output layer and `_OfLogits` in one, with the logits of a few tokens at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        softmax: _Softmax,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        parts = [
            softmax.forward(h @ weight.t(), t)
            for h, t in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
        ]
        logprobs, *rest = (torch.cat(values) for values in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, targets, *rest)
        ctx.set_materialize_grads(False)
        ctx.softmax, ctx.chunk_tokens = softmax, chunk_tokens
        return logprobs, rest[0]

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, *saved = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # Chunks are summed in float32; with a bfloat16 weight each of them is rounded once.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for start in range(0, hidden.shape[0], ctx.chunk_tokens):
            rows = slice(start, start + ctx.chunk_tokens)
            of_rows = [x[rows] for x in saved]
            grads = [None if g is None else g[rows] for g in (grad_logprobs, grad_entropy)]
            grad = ctx.softmax.backward(hidden[rows] @ weight.t(), *of_rows, *grads)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None and weight.dtype == torch.float32:
                grad_weight.addmm_(grad.t(), hidden[rows])
            elif grad_weight is not None:
                grad_weight += grad.t() @ hidden[rows]
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None


def logprobs_and_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of `targets` and entropy of the distribution, differentiable in `logits`.

    Args:
        logits: [..., V / tp], this TP rank's slice of the (padded) vocabulary.
        targets: [...] int64 token ids of the whole vocabulary.
        temperature: divides the logits, > 0.
        vocab_size: ids from here on are padding and get no probability.
        group: the TP group; None where the logits are whole.

    Returns:
        (logprobs, entropy), each float32 [...], equal on all ranks of the group; entropy in nats.
    """
    softmax = _softmax(logits.shape[-1], temperature, vocab_size, group)
    return _OfLogits.apply(logits, targets, softmax)  # pyright: ignore[reportReturnType]


def chunked_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk_tokens: int,
    temperature: float,
    vocab_size: int,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """`logprobs_and_entropy` of the logits `hidden @ weight.T`, without ever holding them all.

    The logits of `chunk_tokens` tokens exist at a time. The backward pass computes them again and
    gives the weight one gradient, as a single matrix product would.

    Args:
        hidden: [n, h], whole on every rank of the group.
        weight: [V / tp, h], this TP rank's slice of the output layer.
        targets: [n] int64 token ids of the whole vocabulary.
        chunk_tokens: > 0; the last chunk may be smaller.
        temperature: divides the logits, > 0.
        vocab_size: ids from here on are padding and get no probability.
        group: the TP group; None where the weight is whole.

    Returns:
        (logprobs, entropy), each float32 [n], equal on all ranks of the group; entropy in nats. The
        gradient of `hidden` is that of this rank's slice: the caller sums it over the group.
    """
    softmax = _softmax(weight.shape[0], temperature, vocab_size, group)
    return _OfHidden.apply(  # pyright: ignore[reportReturnType]
        hidden, weight, targets, softmax, chunk_tokens
    )


def _softmax(
    width: int, temperature: float, vocab_size: int, group: ProcessGroup | None
) -> _Softmax:
    first_id = 0 if group is None else group.rank() * width
    num_valid = max(0, min(width, vocab_size - first_id))
    if group is not None and group.size() == 1:
        group = None
    return _Softmax(temperature, first_id, num_valid, group)
