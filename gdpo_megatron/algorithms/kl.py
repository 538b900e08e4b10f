"""KL of the policy to the reference, estimated from the sampled tokens alone.

With l = log pi - log ref of a token drawn from pi, E[k1] = E[k3] = KL(pi || ref). What a loss needs
is the gradient, and that of the estimator is another thing: E[grad k1] = 0, E[grad k2] = grad KL,
E[grad k3] = grad KL(ref || pi). Multiplied with r = pi / pi_old, whose value corrects tokens drawn
from pi_old and whose gradient is the missing score term, k1 and k3 both give grad KL; for k3 that
is r l grad log pi, token by token (as in DeepSeek-V3.2, arXiv 2512.02556).
"""

from __future__ import annotations

from torch import Tensor

from gdpo_megatron.config.loss import KLEstimator


def kl_estimate(log_ratio: Tensor, estimator: KLEstimator) -> Tensor:
    """Per-token KL estimate (J. Schulman, "Approximating KL divergence", 2020).

    Args:
        log_ratio: any shape; log pi - log ref.
        estimator: k1 = l, k2 = l^2 / 2, k3 = exp(-l) - 1 + l.

    Returns:
        Same shape.
    """
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    return (-log_ratio).expm1() + log_ratio
