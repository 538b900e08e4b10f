"""Log-probability and entropy of tokens from vocabulary-parallel logits.

Each TP rank holds a slice of the vocabulary. Two all-reduces of token size (a maximum, then one
packed sum) give every rank the exact values; the vocabulary is never gathered. Only the logits
themselves are kept for the backward pass, which recomputes the probabilities:

    d logp / d x_i = ([i = target] - p_i) / temperature
    d H    / d x_i = -p_i (log p_i + H) / temperature

Megatron's fused cross entropy rounds its gradient to bfloat16 and gives no entropy.
"""

from __future__ import annotations

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


class _LogprobsAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        temperature: float,
        first_id: int,
        num_valid: int,
        group: ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        x = _scaled(logits, temperature, num_valid)
        maximum = x.amax(-1)
        if group is not None:
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        x -= maximum.unsqueeze(-1)
        local = targets - first_id
        elsewhere = (local < 0) | (local >= x.shape[-1])
        local = local.masked_fill(elsewhere, 0)
        target_logit = x.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0.0)
        weights = x.exp()
        x[..., num_valid:] = 0.0  # their weight is 0, and 0 * -inf is not
        packed = torch.stack([weights.sum(-1), (weights * x).sum(-1), target_logit])
        if group is not None:
            dist.all_reduce(packed, group=group)
        sum_weights, sum_weighted, target_logit = packed.unbind(0)
        log_sum = sum_weights.log()
        entropy = log_sum - sum_weighted / sum_weights
        # Kept apart: their sum would round log_sum away where logits are large.
        ctx.save_for_backward(logits, local, elsewhere, maximum, log_sum, entropy)
        # The gradient of an unused result then comes as None, and its part is not computed.
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.num_valid = temperature, num_valid
        return target_logit - log_sum, entropy

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor, None, None, None, None, None]:
        logits, local, elsewhere, maximum, log_sum, entropy = ctx.saved_tensors
        log_p = _scaled(logits, ctx.temperature, ctx.num_valid)
        log_p -= maximum.unsqueeze(-1)
        log_p -= log_sum.unsqueeze(-1)
        p = log_p.exp()
        grad = torch.zeros_like(p)
        if grad_logprobs is not None:
            grad = -p * grad_logprobs.unsqueeze(-1)
            own = grad_logprobs.masked_fill(elsewhere, 0.0)
            grad.scatter_add_(-1, local.unsqueeze(-1), own.unsqueeze(-1))
        if grad_entropy is not None:
            log_p[..., ctx.num_valid :] = 0.0
            grad -= p * (log_p + entropy.unsqueeze(-1)) * grad_entropy.unsqueeze(-1)
        return (grad / ctx.temperature).to(logits.dtype), None, None, None, None, None


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
    width = logits.shape[-1]
    first_id = 0 if group is None else group.rank() * width
    num_valid = max(0, min(width, vocab_size - first_id))
    if group is not None and group.size() == 1:
        group = None
    return _LogprobsAndEntropy.apply(  # pyright: ignore[reportReturnType]
        logits, targets, temperature, first_id, num_valid, group
    )
