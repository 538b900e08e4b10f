"""The policy objectives, as a loss per token: PPO's clip, GSPO, CISPO."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gdpo_megatron.algorithms.ratio import row_mean
from gdpo_megatron.config.loss import LossConfig


@dataclass(frozen=True, slots=True)
class Surrogate:
    """A policy loss and what its clip did; all [b, S].

    Args:
        loss: per token, unweighted.
        ratio: pi / pi_old as the objective uses it, without gradient.
        clipped_low: bool, the lower bound took the gradient away (CISPO: bounded the weight).
        clipped_high: bool, likewise the upper bound.
        dual_clipped: bool, likewise the dual clip.
    """

    loss: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    dual_clipped: Tensor


Objective = Callable[[Tensor, Tensor, Tensor, Tensor, LossConfig], Surrogate]


def ppo_clip(
    log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, loss_mask: Tensor, config: LossConfig
) -> Surrogate:
    """-min(r A, clip(r) A), and at most -c A for A < 0 with dual clip.

    PPO: arXiv 1707.06347, eq. 7. Asymmetric bounds: DAPO, arXiv 2503.14476. Dual clip: arXiv
    1912.09729.

    Args:
        log_ratio: [b, S] of pi / pi_old.
        logprobs: [b, S]; not used here.
        advantages: [b, S].
        loss_mask: [b, S] bool; not used here.
        config: clip_eps_low, clip_eps_high, dual_clip.
    """
    ratio = log_ratio.exp()
    low, high = 1.0 - config.clip_eps_low, 1.0 + config.clip_eps_high
    objective = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    dual_clipped = torch.zeros_like(advantages, dtype=torch.bool)
    if config.dual_clip is not None:
        floor = config.dual_clip * advantages
        dual_clipped = (advantages < 0) & (objective < floor)
        objective = torch.where(dual_clipped, floor, objective)
    ratio = ratio.detach()
    return Surrogate(
        loss=-objective,
        ratio=ratio,
        clipped_low=(advantages < 0) & (ratio < low),
        clipped_high=(advantages > 0) & (ratio > high),
        dual_clipped=dual_clipped,
    )


def gspo(
    log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, loss_mask: Tensor, config: LossConfig
) -> Surrogate:
    """The clipped surrogate of the sequence's ratio s = exp(mean_t log r_t), at every token.

    arXiv 2507.18071. It is the paper's with aggregation sequence_mean; with another
    one, a sequence counts by its length.

    Args:
        log_ratio: [b, S] of pi / pi_old.
        logprobs: [b, S]; not used here.
        advantages: [b, S], equal along each row.
        loss_mask: [b, S] bool.
        config: clip_eps_low, clip_eps_high.
    """
    of_row = row_mean(log_ratio, loss_mask).expand_as(log_ratio)
    return ppo_clip(of_row, logprobs, advantages, loss_mask, config)


def cispo(
    log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, loss_mask: Tensor, config: LossConfig
) -> Surrogate:
    """-sg(clip(r)) A log pi: REINFORCE with a bounded importance weight.

    MiniMax-M1, arXiv 2506.13585; there without a lower bound, which is clip_eps_low 1.

    Args:
        log_ratio: [b, S] of pi / pi_old.
        logprobs: [b, S] of the current policy, with gradient; 0 where masked.
        advantages: [b, S].
        loss_mask: [b, S] bool; not used here.
        config: clip_eps_low, clip_eps_high.
    """
    ratio = log_ratio.detach().exp()
    low, high = 1.0 - config.clip_eps_low, 1.0 + config.clip_eps_high
    return Surrogate(
        loss=-ratio.clamp(low, high) * advantages * logprobs,
        ratio=ratio,
        clipped_low=ratio < low,
        clipped_high=ratio > high,
        dual_clipped=torch.zeros_like(ratio, dtype=torch.bool),
    )


OBJECTIVES: Mapping[str, Objective] = {"ppo_clip": ppo_clip, "gspo": gspo, "cispo": cispo}
