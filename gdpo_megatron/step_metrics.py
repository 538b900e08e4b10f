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
    lengths = batch.num_loss_tokens.double()
    num_tokens = float(batch.num_generated_tokens)
    values = {
        "rollout/num_tokens": num_tokens,
        "rollout/tokens_per_second": num_tokens / rollout_seconds,
        "completion/mean_tokens": float(lengths.mean()),
        "completion/max_tokens": float(lengths.max()),
        "completion/stopped_share": batch.finish_share("stop"),
        "completion/truncated_share": batch.finish_share("length"),
        "completion/aborted_share": batch.finish_share("abort"),
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


def long_tail_metrics(batch: RolloutBatch) -> dict[str, float]:
    """What became of the groups that were asked for, where steps end before all are finished."""
    return {f"long_tail/{name}": float(batch.cut.counts[name]) for name in LONG_TAIL_COUNTS}


def environment_metrics(batch: RolloutBatch) -> dict[str, float]:
    """What environments did in a step."""
    report, num_rollouts = batch.environment, max(1, len(batch.num_turns))
    return {
        "environment/mean_turns": float(batch.num_turns.double().mean()),
        "environment/mean_tokens": report.num_tokens / num_rollouts,
        "environment/cut_share": report.num_cut / num_rollouts,
        "environment/num_calls": float(report.num_calls),
        "environment/num_faults": float(report.num_faults),
        "environment/num_restarts": float(report.num_restarts),
        "environment/seconds": report.seconds,
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


LONG_TAIL_COUNTS = {
    "num_groups_asked": ("groups", "Groups that the step asked its engines for."),
    "num_groups_resumed": ("groups", "Those of them that an earlier step had begun."),
    "num_groups_carried": ("groups", "Those that go on in the next step."),
    "num_groups_returned": (
        "groups",
        "Those of which nothing is kept; their prompts are drawn again in the next step.",
    ),
    "num_aborted": ("completions", "Completions that were broken off, begun or not."),
    "num_tokens_dropped": ("tokens", "Tokens of completions that are neither used nor carried."),
    "num_tokens_resumed": (
        "tokens",
        "Tokens of the step's finished completions that an earlier policy version drew.",
    ),
    "max_version_lag": (
        "optimizer steps",
        "Largest number of versions that such a token is behind the one that finished the step.",
    ),
}
"""Name -> unit and definition."""

ENVIRONMENT_METRICS = {
    "mean_turns": ("turns", "Turns of the model per completion."),
    "mean_tokens": ("tokens", "Tokens per completion that are the environment's."),
    "cut_share": ("share", "Completions that ended because max_turns was reached."),
    "num_calls": ("turns", "Turns that environments were asked about."),
    "num_faults": (
        "rollouts",
        "Rollouts without any reward, because their environment raised, was too slow or died.",
    ),
    "num_restarts": ("processes", "Environment processes that had to be started anew."),
    "seconds": ("seconds", "Time of all calls of environments, in whatever process."),
}
"""Name -> unit and definition."""

for _name, (_unit, _definition) in ENVIRONMENT_METRICS.items():
    declare_metric(
        f"environment/{_name}",
        _unit,
        f"{_definition} Only with rollout.environment.",
        "sum" if _name.startswith("num_") or _name == "seconds" else "mean",
    )
for _name, (_unit, _definition) in LONG_TAIL_COUNTS.items():
    declare_metric(
        f"long_tail/{_name}",
        _unit,
        f"{_definition} Only where rollout.long_tail ends steps early.",
        "max" if _name.startswith("max_") else "sum",
    )
for _name, _info in LOSS_METRICS.items():
    declare_metric(f"update/{_name}", _info.unit, _info.definition, _combine(_name))
for _name, _info in DIAGNOSTICS.items():
    declare_metric(f"advantage/{_name}", _info.unit, _info.definition)
