"""Algorithms as pure functions: advantages from rewards, losses from log-probs.

Nothing here knows ranks, Megatron or engines; sums leave, and the caller divides.
"""

from gdpo_megatron.algorithms import gd2po as _gd2po
from gdpo_megatron.algorithms import gdpo as _gdpo
from gdpo_megatron.algorithms import grpo as _grpo
from gdpo_megatron.algorithms.advantages import compute_advantages, resolve_weights
from gdpo_megatron.algorithms.aggregation import loss_denominator
from gdpo_megatron.algorithms.diagnostics import (
    DIAGNOSTICS,
    advantage_diagnostics,
    diagnostic_names,
)
from gdpo_megatron.algorithms.dynamic_sampling import GroupDecision, Refill, decide_groups
from gdpo_megatron.algorithms.estimators import (
    ESTIMATORS,
    AdvantageEstimator,
    Estimate,
    GroupedRewards,
    resolve_estimator,
)
from gdpo_megatron.algorithms.logprob_contract import (
    logprob_problems,
    needs_old_pass,
    needs_reference,
)
from gdpo_megatron.algorithms.loss_stats import LOSS_METRICS, MetricInfo, loss_metrics
from gdpo_megatron.algorithms.policy_loss import PolicyLossTerms, policy_loss_terms

# Imported so that their estimators are registered.
_BUILT_IN = (_gdpo, _grpo, _gd2po)

__all__ = [
    "DIAGNOSTICS",
    "ESTIMATORS",
    "LOSS_METRICS",
    "AdvantageEstimator",
    "Estimate",
    "GroupDecision",
    "GroupedRewards",
    "MetricInfo",
    "PolicyLossTerms",
    "Refill",
    "advantage_diagnostics",
    "compute_advantages",
    "decide_groups",
    "diagnostic_names",
    "logprob_problems",
    "loss_denominator",
    "loss_metrics",
    "needs_old_pass",
    "needs_reference",
    "policy_loss_terms",
    "resolve_estimator",
    "resolve_weights",
]
