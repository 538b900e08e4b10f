"""The batch stage: combined advantages over their std in the whole batch (paper eq. 6).

Per rollout the mean is 0 by construction, so this only divides: no sign flips and a group without
signal stays exactly 0. Per token neither holds once length goes with reward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gdpo_megatron.algorithms.groups import ROUNDING, total
from gdpo_megatron.config.advantage import AdvantageConfig
from gdpo_megatron.errors import InputError


@dataclass(frozen=True, slots=True)
class BatchStage:
    """Result of the batch stage.

    Args:
        advantages: [B] float64; 0 in rows that do not take part.
        mean: of the combined advantages, weighted as batch_norm says.
        std: of the combined advantages, before floor and eps.
        floor_active: whether batch_std_floor was above it.
    """

    advantages: Tensor
    mean: float
    std: float
    floor_active: bool


def batch_normalize(
    combined: Tensor, keep: Tensor, num_tokens: Tensor | None, config: AdvantageConfig
) -> BatchStage:
    """(A - mean_B A) / (std_B A + eps) over the rows in `keep`.

    Args:
        combined: [B] float64 in canonical order.
        keep: [B] bool, rows that take part.
        num_tokens: [B] completion tokens; needed for batch_norm token.
        config: batch_norm (sequence or token), batch_ddof, batch_eps, batch_eps_mode,
            batch_std_floor.

    Raises:
        InputError: batch_ddof leaves no degree of freedom; token without num_tokens.
    """
    kept = torch.where(keep, combined, 0.0)
    if config.batch_norm == "token":
        if num_tokens is None:
            raise InputError(
                "advantage.batch_norm is 'token' but no num_tokens was given; "
                "give the completion lengths, or use batch_norm: sequence"
            )
        weight = num_tokens.to(kept.dtype) * keep
    else:
        weight = keep.to(kept.dtype)
    count = total(weight)
    if 1 < count <= config.batch_ddof:
        raise InputError(
            f"advantage.batch_ddof is {config.batch_ddof}, but the batch stage has only "
            f"{count:.0f} {config.batch_norm}s to work on; 1 is the unbiased std"
        )
    if count <= 1:
        return BatchStage(torch.zeros_like(kept), total(kept * weight), 0.0, False)

    # verl adds its eps to the counts as well.
    count_eps = config.batch_eps if config.batch_eps_mode == "var_rsqrt" else 0.0
    mean = total(kept * weight) / (count + count_eps)
    if abs(mean) <= ROUNDING * total(kept.abs() * weight) / count:
        mean = 0.0
    centred = kept - mean
    square_mean = total(centred.square() * weight) / (count + count_eps)
    variance = square_mean * (count / (count - config.batch_ddof))
    std = variance**0.5
    floor = config.batch_std_floor or 0.0
    floored = max(std, floor)
    if config.batch_eps_mode == "var_rsqrt":
        divisor = (floored**2 + config.batch_eps) ** 0.5
    else:
        divisor = floored + config.batch_eps
    # A divisor of 0 means that all rows are equal, and then all are 0 already.
    advantages = torch.where(keep, centred / divisor if divisor > 0 else centred, 0.0)
    return BatchStage(advantages, mean, std, std < floor)
