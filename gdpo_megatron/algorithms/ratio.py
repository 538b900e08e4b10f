"""Ratios of probabilities from log-probs, safe against overflow."""

from __future__ import annotations

import torch
from torch import Tensor

# exp(20) = 5e8: no clip or cap lets such a ratio act, and exp never overflows float32.
MAX_LOG_RATIO = 20.0


def log_ratio(logprobs: Tensor, other: Tensor, loss_mask: Tensor) -> Tensor:
    """Log of pi / pi_other per token, within +-MAX_LOG_RATIO.

    Args:
        logprobs: [b, S]; may hold anything where masked.
        other: [b, S], likewise; no gradient flows into it.
        loss_mask: [b, S] bool.

    Returns:
        [b, S], 0 where masked; the gradient is 0 there too, and where the bound acts.
    """
    difference = masked(logprobs, loss_mask) - masked(other.detach(), loss_mask)
    return difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def masked(values: Tensor, loss_mask: Tensor) -> Tensor:
    """`values` where the mask is set, else 0, in float32 at least (float64 stays)."""
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    return torch.where(loss_mask, values.to(dtype), 0.0)


def row_mean(values: Tensor, loss_mask: Tensor) -> Tensor:
    """Mean over the loss tokens of each row, [b, S] to [b, 1]; 0 for a row without any."""
    count = loss_mask.sum(1, keepdim=True).clamp(min=1)
    return (values * loss_mask).sum(1, keepdim=True) / count
