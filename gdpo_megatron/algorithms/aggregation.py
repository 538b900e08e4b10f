"""How per-token losses become one number: a weight per token here, one global denominator there.

loss = sum over all tokens of all ranks of (weight * token loss) / denominator. The denominator is
that of the whole minibatch (one optimizer step), over data- and context-parallel ranks; a mean of
local means would weigh ranks and micro-batches by how they were cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdpo_megatron.config.loss import Aggregation


def token_weights(
    loss_mask: Tensor, aggregation: Aggregation, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weight of each token's loss.

    Args:
        loss_mask: [b, S] bool; rows are whole completions.
        aggregation: of the `loss` section.
        dtype: of the loss.

    Returns:
        [b, S]; 0 where masked.
    """
    weights = loss_mask.to(dtype)
    if aggregation == "sequence_mean":
        return weights / weights.sum(1, keepdim=True).clamp(min=1.0)
    return weights


def loss_denominator(
    aggregation: Aggregation,
    *,
    num_loss_tokens: float,
    num_loss_rows: float,
    max_completion_tokens: int,
) -> float:
    """What the weighted sum over the minibatch is divided by.

    Args:
        aggregation: token_mean: loss tokens; sequence_mean: rows with loss tokens; fixed_length:
            such rows times max_completion_tokens (Dr. GRPO, arXiv 2503.20783).
        num_loss_tokens: loss tokens of the minibatch over all ranks.
        num_loss_rows: rows with at least one of them, over all ranks.
        max_completion_tokens: the rollout's limit.

    Returns:
        At least 1, so that a minibatch without loss tokens has loss 0.
    """
    if aggregation == "token_mean":
        denominator = num_loss_tokens
    elif aggregation == "sequence_mean":
        denominator = num_loss_rows
    else:
        denominator = num_loss_rows * max_completion_tokens
    return max(float(denominator), 1.0)
