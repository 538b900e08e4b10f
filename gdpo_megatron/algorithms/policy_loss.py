"""The loss of an update on one micro-batch, from log-probs to sums.

Objective times mismatch weight, plus KL, minus entropy bonus, per token and weighted by the
aggregation. Only sums leave: the caller divides by the global denominator (aggregation.py), so that
one large micro-batch and many small ones on any number of ranks give the same gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gdpo_megatron.algorithms.aggregation import token_weights
from gdpo_megatron.algorithms.kl import kl_estimate
from gdpo_megatron.algorithms.loss_stats import masked_maximum, masked_sum, ratio_sums
from gdpo_megatron.algorithms.mismatch import importance_weights
from gdpo_megatron.algorithms.objectives import OBJECTIVES
from gdpo_megatron.algorithms.ratio import log_ratio, masked
from gdpo_megatron.config.loss import LossConfig
from gdpo_megatron.errors import InputError


@dataclass(frozen=True, slots=True)
class PolicyLossTerms:
    """Loss and statistics of a micro-batch.

    Args:
        token_loss: [b, S] float32 with gradient, weighted by the aggregation, 0 where masked; its
            sum over the minibatch divided by `loss_denominator` is the loss.
        sums: scalars without gradient that add over micro-batches and ranks.
        maxima: scalars of which the maximum is taken instead.
    """

    token_loss: Tensor
    sums: Mapping[str, Tensor]
    maxima: Mapping[str, Tensor]


def policy_loss_terms(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    loss_mask: Tensor,
    config: LossConfig,
    *,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
) -> PolicyLossTerms:
    """Compute the loss terms of a micro-batch.

    All log-probs are those of the sampled tokens at the rollout's temperature (logprob_contract.py)
    and may hold anything where masked, NaN included.

    Args:
        logprobs: [b, S] of the current policy, with gradient.
        old_logprobs: [b, S] of the policy before the update; None unless old_logprobs is recompute.
        advantages: [b] or [b, S].
        loss_mask: [b, S] bool; completion tokens that count.
        config: the `loss` section.
        ref_logprobs: [b, S] of the reference; needed with kl_coef > 0, measured when given.
        rollout_logprobs: [b, S] of the engine; needed for mismatch.correction and old_logprobs
            rollout, measured when given.
        entropy: [b, S] of the current policy, with gradient if entropy_coef > 0.

    Raises:
        InputError: an input that the config needs is None, or shapes differ.
    """
    loss_mask = loss_mask.bool()
    correction = config.mismatch.correction
    old = _old_logprobs(config, logprobs, old_logprobs, rollout_logprobs)
    _check_inputs(
        loss_mask.shape,
        {
            "logprobs": (logprobs, "always"),
            "old_logprobs": (old, f"loss.old_logprobs '{config.old_logprobs}'"),
            "ref_logprobs": (ref_logprobs, "loss.kl_coef > 0" if config.kl_coef else ""),
            "rollout_logprobs": (
                rollout_logprobs,
                f"loss.mismatch.correction '{correction}'" if correction != "none" else "",
            ),
            "entropy": (entropy, "loss.entropy_coef > 0" if config.entropy_coef else ""),
        },
    )
    assert old is not None
    current = masked(logprobs, loss_mask)
    if advantages.shape not in (loss_mask.shape, loss_mask.shape[:1]):
        rows, length = loss_mask.shape
        raise InputError(
            f"advantages must be [{rows}] or [{rows}, {length}], got {tuple(advantages.shape)}"
        )
    if advantages.ndim == 1:
        advantages = advantages[:, None].expand_as(current)
    advantages = masked(advantages, loss_mask).to(current.dtype)
    log_r = log_ratio(logprobs, old, loss_mask)
    surrogate = OBJECTIVES[config.objective](log_r, current, advantages, loss_mask, config)
    loss = surrogate.loss
    sums = ratio_sums(surrogate, log_r.detach(), loss_mask)
    maxima = {"ratio_max": masked_maximum(surrogate.ratio, loss_mask)}

    if rollout_logprobs is not None:
        log_w = log_ratio(old.detach(), rollout_logprobs, loss_mask)
        importance = importance_weights(log_w, loss_mask, config.mismatch)
        loss = loss * importance.used
        sums |= {
            "mismatch_k1": masked_sum(-log_w, loss_mask),
            "mismatch_kl": masked_sum(kl_estimate(-log_w, "k3"), loss_mask),
            "mismatch_abs_diff": masked_sum(log_w.abs(), loss_mask),
            "importance_weight": masked_sum(importance.raw, loss_mask),
            "importance_weight_squared": masked_sum(importance.raw.square(), loss_mask),
            "importance_weight_bounded": masked_sum(importance.bounded, loss_mask),
        }
        maxima["mismatch_abs_diff_max"] = masked_maximum(log_w.abs(), loss_mask)
        maxima["importance_weight_max"] = masked_maximum(importance.raw, loss_mask)
    sums["policy_loss"] = masked_sum(loss, loss_mask)
    if ref_logprobs is not None:
        kl = kl_estimate(log_ratio(logprobs, ref_logprobs, loss_mask), config.kl_estimator)
        sums["kl"] = masked_sum(kl, loss_mask)
        if config.kl_coef > 0:
            kl = log_r.exp() * kl if config.kl_gradient == "unbiased" else kl
            loss = loss + config.kl_coef * kl
    if entropy is not None:
        entropy = masked(entropy, loss_mask)
        sums["entropy"] = masked_sum(entropy, loss_mask)
        if config.entropy_coef > 0:
            loss = loss - config.entropy_coef * entropy
    weights = token_weights(loss_mask, config.aggregation, loss.dtype)
    token_loss = torch.where(loss_mask, loss * weights, 0.0)
    return PolicyLossTerms(token_loss=token_loss, sums=sums, maxima=maxima)


def _old_logprobs(
    config: LossConfig, logprobs: Tensor, old: Tensor | None, rollout: Tensor | None
) -> Tensor | None:
    if config.old_logprobs == "current":
        return logprobs.detach()
    return rollout if config.old_logprobs == "rollout" else old


def _check_inputs(shape: torch.Size, inputs: Mapping[str, tuple[Tensor | None, str]]) -> None:
    """Report all inputs that are needed (for the reason given) and absent, or of another shape."""
    problems: list[str] = []
    for name, (tensor, needed_for) in inputs.items():
        if tensor is None:
            if needed_for:
                problems.append(f"{needed_for} needs {name}, and none was given")
        elif tensor.shape != shape:
            problems.append(
                f"{name} must be {tuple(shape)} as loss_mask, got {tuple(tensor.shape)}"
            )
    if problems:
        raise InputError(problems)
