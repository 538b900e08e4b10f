"""From the sums of an update to its metrics: what each is divided by, its unit and its meaning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gdpo_megatron.algorithms.objectives import Surrogate


@dataclass(frozen=True, slots=True)
class MetricInfo:
    """What a metric is.

    Args:
        unit: "share" means a fraction of 1; "nats" natural-log units; "1" a plain number.
        definition: one sentence.
    """

    unit: str
    definition: str


# Each sum below, divided by num_loss_tokens, is the metric of the same name.
TOKEN_MEANS: Mapping[str, MetricInfo] = {
    "policy_loss": MetricInfo("1", "policy objective as a loss, mismatch weight included"),
    "ratio": MetricInfo("1", "pi / pi_old of the objective"),
    "clip_low_fraction": MetricInfo(
        "share", "tokens whose ratio is below the lower bound with A < 0 (cispo: with any A)"
    ),
    "clip_high_fraction": MetricInfo(
        "share", "tokens whose ratio is above the upper bound with A > 0 (cispo: with any A)"
    ),
    "dual_clip_fraction": MetricInfo("share", "tokens that the dual clip holds"),
    "update_kl": MetricInfo("nats", "KL(pi_old || pi) of the update so far, k3 estimate"),
    "kl": MetricInfo("nats", "KL(pi || reference) by kl_estimator"),
    "entropy": MetricInfo("nats", "entropy of the policy's next-token distribution"),
    "mismatch_k1": MetricInfo("nats", "mean of log pi_rollout - log pi_old; signed"),
    "mismatch_kl": MetricInfo("nats", "KL(pi_rollout || pi_old), k3 estimate"),
    "mismatch_abs_diff": MetricInfo("nats", "mean of |log pi_rollout - log pi_old|"),
    "importance_weight": MetricInfo("1", "pi_old / pi_rollout before any bound"),
    "importance_weight_bounded": MetricInfo("share", "tokens whose weight is truncated or masked"),
}

MAXIMA: Mapping[str, MetricInfo] = {
    "ratio_max": MetricInfo("1", "largest pi / pi_old of a token"),
    "mismatch_abs_diff_max": MetricInfo("nats", "largest |log pi_rollout - log pi_old| of a token"),
    "importance_weight_max": MetricInfo("1", "largest importance weight of a token"),
}

LOSS_METRICS: Mapping[str, MetricInfo] = {
    **TOKEN_MEANS,
    **MAXIMA,
    "importance_effective_share": MetricInfo(
        "share", "effective sample size (sum w)^2 / (n sum w^2) of the tokens"
    ),
    "num_loss_tokens": MetricInfo("tokens", "unmasked completion tokens"),
    "num_loss_rows": MetricInfo("rollouts", "rollouts with at least one of them"),
}


def loss_metrics(sums: Mapping[str, float], maxima: Mapping[str, float]) -> dict[str, float]:
    """Divide the sums of a minibatch (or step) over all micro-batches and ranks.

    Args:
        sums: added-up `PolicyLossTerms.sums`.
        maxima: maxima of `PolicyLossTerms.maxima`.

    Returns:
        Metrics named as in LOSS_METRICS; those whose input was absent are absent.
    """
    num_tokens = max(float(sums["num_loss_tokens"]), 1.0)
    metrics = {name: float(sums[name]) / num_tokens for name in TOKEN_MEANS if name in sums}
    metrics |= {name: float(maxima[name]) for name in MAXIMA if name in maxima}
    squared = float(sums.get("importance_weight_squared", 0.0))
    if squared > 0:
        share = float(sums["importance_weight"]) ** 2 / (num_tokens * squared)
        metrics["importance_effective_share"] = share
    metrics["num_loss_tokens"] = float(sums["num_loss_tokens"])
    metrics["num_loss_rows"] = float(sums["num_loss_rows"])
    return metrics


def ratio_sums(surrogate: Surrogate, log_ratio: Tensor, loss_mask: Tensor) -> dict[str, Tensor]:
    """Counts, ratio, clip and update KL of a micro-batch, as sums over its loss tokens."""
    return {
        "num_loss_tokens": masked_sum(loss_mask, loss_mask),
        "num_loss_rows": loss_mask.any(1).sum(dtype=torch.float64),
        "ratio": masked_sum(surrogate.ratio, loss_mask),
        "clip_low_fraction": masked_sum(surrogate.clipped_low, loss_mask),
        "clip_high_fraction": masked_sum(surrogate.clipped_high, loss_mask),
        "dual_clip_fraction": masked_sum(surrogate.dual_clipped, loss_mask),
        "update_kl": masked_sum(log_ratio.expm1() - log_ratio, loss_mask),
    }


def masked_sum(values: Tensor, loss_mask: Tensor) -> Tensor:
    """Sum over the loss tokens, a float64 scalar without gradient."""
    return torch.where(loss_mask, values.detach().double(), 0.0).sum()


def masked_maximum(values: Tensor, loss_mask: Tensor) -> Tensor:
    """Maximum over the loss tokens, a float64 scalar; 0 if there are none (values are positive)."""
    kept = torch.where(loss_mask, values.detach().double(), 0.0)
    return kept.max() if kept.numel() else kept.sum()
