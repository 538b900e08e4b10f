"""A step's results as the metrics that are logged; definitions: observability/metrics.py."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from gdpo_megatron.algorithms import LOSS_METRICS, loss_metrics
from gdpo_megatron.algorithms.diagnostics import DIAGNOSTICS, advantage_diagnostics
from gdpo_megatron.config.advantage import AdvantageConfig
from gdpo_megatron.observability.metrics import Combine, declare_metric
from gdpo_megatron.rollout.runner import RolloutBatch
from gdpo_megatron.types import AdvantageBatch, RewardMatrix
from gdpo_megatron.update import PolicyLoss


def rollout_metrics(batch: RolloutBatch, rollout_seconds: float) -> dict[str, float]:
    """Metrics of all rollouts of a step and of their rewards, dropped groups included.

    Args:
        batch: the step's rollouts.
        rollout_seconds: wall clock of generation, with the rewards that were waited for.
    """
    lengths = batch.lengths.double()
    num_tokens = float(lengths.sum())
    values = {
        "rollout/num_tokens": num_tokens,
        "rollout/tokens_per_second": num_tokens / rollout_seconds,
        "completion/mean_tokens": float(lengths.mean()),
        "completion/max_tokens": float(lengths.max()),
        "completion/stopped_share": batch.finish_share("stop"),
        "completion/truncated_share": batch.finish_share("length"),
    }
    for column, name in enumerate(batch.rewards.names):
        values |= {f"reward/{name}/{k}": v for k, v in _reward_metrics(batch, column).items()}
    report = batch.report
    return values | {
        "reward_suite/wait_seconds": report.wait_seconds,
        "reward_suite/num_restarts": report.num_restarts,
        "reward_suite/num_recycled": report.num_recycled,
        "reward_suite/num_retries": report.num_retries,
    }


def advantage_metrics(
    rewards: RewardMatrix,
    advantages: AdvantageBatch,
    num_tokens: torch.Tensor,
    config: AdvantageConfig,
) -> dict[str, float]:
    """Metrics of the advantage stage; arguments as in `advantage_diagnostics`."""
    a = advantages.advantages
    if not len(a):
        return {}
    values = advantage_diagnostics(rewards, advantages, num_tokens, config)
    values |= {
        "distinct_values": float(len(torch.unique((a * 1e6).round()))),
        "std": float(a.std()) if len(a) > 1 else 0.0,
        "abs_mean": float(a.abs().mean()),
    }
    return {f"advantage/{name}": value for name, value in values.items()}


def _reward_metrics(batch: RolloutBatch, column: int) -> dict[str, float]:
    valid, not_applicable = batch.rewards.valid[:, column], batch.not_applicable[:, column]
    scores, raw = batch.rewards.values[valid, column].double(), batch.raw[valid, column].double()
    name, report = batch.rewards.names[column], batch.report
    metrics = {
        "invalid": float((~valid & ~not_applicable).sum()),
        "not_applicable": float(not_applicable.sum()),
        "timeouts": float(report.num_timeouts(name)),
        "seconds": report.seconds.get(name, 0.0),
    }
    for event, count in report.events.get(name, {}).items():
        metrics["num_" + re.sub(r"\W", "_", event)] = float(count)
    if not len(scores):
        return metrics | {"mean": float("nan")}
    return metrics | {
        "mean": float(scores.mean()),
        "std": float(scores.std()) if len(scores) > 1 else 0.0,
        "raw_mean": float(raw.mean()),
        "min_share": float((scores == scores.min()).double().mean()),
        "max_share": float((scores == scores.max()).double().mean()),
    }


def update_metrics(stats: Mapping[str, float], loss: PolicyLoss) -> dict[str, float]:
    """Metrics of one minibatch, from the statistics that `MegatronPolicy.update` returns."""
    metrics = loss_metrics(
        {name: stats[name] for name in loss.sums}, {name: stats[name] for name in loss.maxima}
    )
    return {
        "update/loss": stats["total"],
        **{f"update/{name}": value for name, value in metrics.items()},
        "update/padding_share": stats["padding_share"],
        "optimizer/lr": stats["lr"],
        "optimizer/grad_norm": stats["grad_norm"],
    }


def _combine(name: str) -> Combine:
    if name.startswith("num_"):
        return "sum"
    return "max" if name.endswith("_max") else "mean"


for _name, _info in LOSS_METRICS.items():
    declare_metric(f"update/{_name}", _info.unit, _info.definition, _combine(_name))
for _name, _info in DIAGNOSTICS.items():
    declare_metric(f"advantage/{_name}", _info.unit, _info.definition)
