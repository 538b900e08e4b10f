"""Train/rollout mismatch: the engine sampled from pi_rollout, the update takes it for pi_old.

The importance weight w = pi_old / pi_rollout of a token (or sequence) says how far apart they are.
Diagnostics are always computed; a correction multiplies the policy loss with a bounded w.
Truncation (TIS): Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
training". Two-sided masking (IcePop): Ling team 2025, "Small leak can sink a great ship".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gdpo_megatron.algorithms.ratio import MAX_LOG_RATIO, row_mean
from gdpo_megatron.config.loss import MismatchConfig


@dataclass(frozen=True, slots=True)
class ImportanceWeights:
    """Weights of the policy loss; all [b, S], without gradient.

    Args:
        raw: the weight before any bound, of the token or of its sequence.
        used: what multiplies the loss.
        bounded: bool, truncated or masked.
    """

    raw: Tensor
    used: Tensor
    bounded: Tensor


def importance_weights(
    log_weight: Tensor, loss_mask: Tensor, config: MismatchConfig
) -> ImportanceWeights:
    """Bound the weights as the config says.

    Args:
        log_weight: [b, S], log pi_old - log pi_rollout; 0 where masked.
        loss_mask: [b, S] bool.
        config: the `loss.mismatch` section.
    """
    log_weight = log_weight.detach()
    if config.correction in ("sequence_truncate", "sequence_mask"):
        of_row = row_mean(log_weight, loss_mask)
        if config.sequence_weight == "product":
            of_row = of_row * loss_mask.sum(1, keepdim=True)
        log_weight = of_row.expand_as(log_weight).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    raw = log_weight.exp()
    above = raw > config.max_importance_weight
    if config.correction == "none":
        return ImportanceWeights(raw, torch.ones_like(raw), torch.zeros_like(above))
    if config.correction in ("token_truncate", "sequence_truncate"):
        return ImportanceWeights(raw, raw.clamp(max=config.max_importance_weight), above)
    outside = above
    if config.correction == "icepop":
        outside = above | (raw < config.min_importance_weight)
    return ImportanceWeights(raw, torch.where(outside, 0.0, raw), outside)
