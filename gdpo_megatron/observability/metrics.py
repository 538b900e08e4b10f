"""Every metric, by name, with its definition; and where they are written.

A metric is defined in the table below or, where its owner keeps a table of its own, by
`declare_metric`; a name that is in neither is refused. docs/metrics.md is written from them by
`python tools/write_docs.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from gdpo_megatron.errors import InputError, did_you_mean
from gdpo_megatron.observability.files import write_atomically

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

Combine = Literal["mean", "max", "sum", "last"]


@dataclass(frozen=True)
class Metric:
    """One metric, or a family of them.

    Args:
        name: `group/what`; a part in braces stands for any word without "/".
        unit: what 1.0 of it is.
        combine: how the values of a step's minibatches become the value of the step.
        definition: what it is, precisely enough to compute it again.
    """

    name: str
    unit: str
    combine: Combine
    definition: str

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the names that this metric covers."""
        parts = re.split(r"\{\w+\}", self.name)
        return re.compile("[^/]+".join(re.escape(part) for part in parts))


_EVALUATION = (
    ("{reward}/mean", "reward", "Mean over prompts of the mean over a prompt's valid entries."),
    (
        "{reward}/standard_error", "reward",
        "Standard error of that mean, prompts taken as independent: the std (n - 1) of the "
        "per-prompt means / sqrt(number of prompts).",
    ),
    (
        "pass@{k}", "share",
        "Unbiased estimate of the chance that one of k completions of a prompt is right "
        "(eval.correct), mean over prompts; pass@1 is the accuracy.",
    ),
    ("exceed_share", "share", "Share of completions longer than eval.exceed_tokens."),
    ("format_share", "share", "Share of completions where eval.format_reward is at least 1."),
    ("bug_share", "share", "Share of completions where eval.bug_reward is below 1."),
    ("truncated_share", "share", "Share of completions cut at eval.max_completion_tokens."),
    ("mean_tokens", "tokens", "Mean length of completions."),
    (
        "invalid_share", "share",
        "Share of the entries, completions by rewards, without a score because a reward failed or "
        "refused.",
    ),
)  # fmt: skip
"""What is told of data.eval, and of each set of eval.sets: name, unit, definition."""


def _evaluation_metrics() -> Iterator[Metric]:
    for where, what in (("eval", "data.eval"), ("eval/{set}", "A set of eval.sets")):
        for name, unit, definition in _EVALUATION:
            yield Metric(f"{where}/{name}", unit, "last", f"{what}. {definition}")


# The reward of a rollout is "valid" when its function gave a score. All counts are global.
METRICS: tuple[Metric, ...] = (
    Metric(
        "reward/{reward}/mean", "reward", "mean",
        "Mean over the step's valid entries, after the condition (`when`), before the weight.",
    ),
    Metric(
        "reward/{reward}/std", "reward", "mean",
        "Standard deviation (n - 1) of the same entries.",
    ),
    Metric(
        "reward/{reward}/raw_mean", "reward", "mean",
        "Mean of the same entries before the condition; equal to `mean` without one.",
    ),
    Metric(
        "reward/{reward}/min_share", "share", "mean",
        "Share of the valid entries that equal the smallest one of this step.",
    ),
    Metric(
        "reward/{reward}/max_share", "share", "mean",
        "Share of the valid entries that equal the largest one; with `min_share` 1 as well, "
        "the reward is constant and teaches nothing in this step.",
    ),
    Metric(
        "reward/{reward}/invalid", "rollouts", "sum",
        "Entries without a score because the reward function failed or refused, or because the "
        "completion was broken off (completion/aborted_share).",
    ),
    Metric(
        "reward/{reward}/not_applicable", "rollouts", "sum",
        "Entries without a score because the reward does not concern the prompt.",
    ),
    Metric(
        "reward/{reward}/timeouts", "rollouts", "sum",
        "Those of the invalid entries whose reward was not done in time: its own time, the step's, "
        "or an event loop that it blocked.",
    ),
    Metric(
        "reward/{reward}/seconds", "s", "sum",
        "Time in the reward's function, over all its calls in all workers.",
    ),
    Metric(
        "reward/{reward}/num_{event}", "events", "sum",
        "What the reward itself counted (`count_event`), whatever the score.",
    ),
    Metric(
        "reward_suite/wait_seconds", "s", "sum",
        "Time from the end of generation to the last score, on the engine that waited longest; the "
        "rest of the rewards' time was hidden behind generation.",
    ),
    Metric(
        "reward_suite/num_restarts", "workers", "sum",
        "Reward workers that were killed (time, memory) or died, and were replaced.",
    ),
    Metric(
        "reward_suite/num_recycled", "workers", "sum",
        "Reward workers that were replaced between two calls, because of the memory or open files "
        "that calls had left behind.",
    ),
    Metric(
        "reward_suite/num_retries", "calls", "sum",
        "Reward calls that were made once more, because their worker had ended.",
    ),
    Metric(
        "completion/mean_tokens", "tokens", "mean",
        "Mean length of the step's completions, stop token included.",
    ),
    Metric("completion/max_tokens", "tokens", "max", "Length of the longest completion."),
    Metric(
        "completion/stopped_share", "share", "mean",
        "Share of completions that ended by themselves: a stop token or stop string.",
    ),
    Metric(
        "completion/truncated_share", "share", "mean",
        "Share of completions cut at rollout.max_completion_tokens.",
    ),
    Metric(
        "completion/aborted_share", "share", "mean",
        "Share of the step's completions that rollout.long_tail broke off; they are in no group "
        "statistic and not in the loss.",
    ),
    Metric(
        "rollout/num_tokens", "tokens", "sum",
        "Completion tokens that the engines drew in the step, used or not.",
    ),
    Metric(
        "rollout/tokens_per_second", "tokens/s", "mean",
        "rollout/num_tokens / time/rollout_seconds: all engines together, prompts not counted.",
    ),
    Metric(
        "dynamic_sampling/num_rounds", "rounds", "sum",
        "Rollout rounds of the step. This and the following only where dynamic_sampling.filter is "
        "not none.",
    ),
    Metric("dynamic_sampling/num_groups_sampled", "groups", "sum", "Groups sampled in all rounds."),
    Metric("dynamic_sampling/num_groups_kept", "groups", "sum", "Groups that are trained on."),
    Metric(
        "dynamic_sampling/num_groups_{reason}", "groups", "sum",
        "Groups dropped, by reason: surplus (the batch was full), unscored (no valid reward), or "
        "what the filter in use says.",
    ),
    Metric(
        "advantage/distinct_values", "values", "mean",
        "Different advantages in the step, rounded to 6 decimals. The paper's measure: GDPO keeps "
        "apart what the sum of rewards makes equal.",
    ),
    Metric("advantage/std", "1", "mean", "Standard deviation (n - 1) of the advantages."),
    Metric("advantage/abs_mean", "1", "mean", "Mean absolute advantage."),
    Metric(
        "update/loss", "1", "mean",
        "What is minimised, over all ranks: update/policy_loss + loss.kl_coef * update/kl.",
    ),
    Metric("optimizer/lr", "1", "last", "Learning rate of the step's last optimizer step."),
    Metric(
        "optimizer/grad_norm", "1", "mean",
        "Global L2 norm of the gradient before it is clipped.",
    ),
    Metric(
        "update/padding_share", "share", "mean",
        "Share of the positions computed, over all ranks, that hold no token of a row: "
        "rows are padded to the longest of their micro-batch, and filler keeps ranks in step. "
        "train.packing and train.max_tokens_per_micro_batch lower it.",
    ),
    Metric(
        "sft/padding_share", "share", "mean",
        "As update/padding_share.",
    ),
    Metric(
        "fp8/active", "1", "last",
        "1 while the policy multiplies in FP8, 0 after it fell back. This only where precision.fp8 "
        "is set, the following only in steps that precision.fp8.parity_check checks.",
    ),
    Metric(
        "fp8/max_logprob_diff", "nats", "max",
        "Largest difference of a completion token's log-prob with FP8 and without, in the first "
        "micro-batch of each data-parallel rank, before the step's update.",
    ),
    Metric(
        "fp8/grad_cosine", "1", "mean",
        "Cosine of the angle between the gradients of the sum of these log-probs with FP8 and "
        "without, over all trained parameters; 1 where both are 0.",
    ),
    Metric("sft/loss", "nats", "mean", "Cross-entropy per completion token."),
    Metric(
        "sft/tokens_per_second", "tokens/s", "mean",
        "Completion tokens learned from, over all ranks, / time/step_seconds.",
    ),
    *_evaluation_metrics(),
    Metric(
        "time/step_seconds", "s", "sum",
        "Wall clock of the whole step on rank 0, with what no phase covers.",
    ),
    Metric(
        "time/{phase}_seconds", "s", "sum",
        "Wall clock of a phase on rank 0; that of a phase within it is counted in both, that of "
        "saving a checkpoint in the step after it.",
    ),
    Metric(
        "weight_sync/num_bytes", "bytes", "last",
        "Weights given to the engines in a sync, each tensor counted once and whole.",
    ),
    Metric(
        "weight_sync/num_checksums", "tensors", "last",
        "Tensors whose checksum at the engine was compared with the policy's. This and the next "
        "only in steps where weight_sync.checksum_interval says so.",
    ),
    Metric(
        "weight_sync/num_resident", "tensors", "last",
        "Tensors that the engine gave back after the sync, compared likewise; 0 where it cannot.",
    ),
    Metric(
        "weight_sync/canary_max_logprob_diff", "nats", "last",
        "Largest difference between engine and policy of a token's log-prob, over the canary's "
        "tokens. This and the next two only in steps where weight_sync.canary.interval says so.",
    ),
    Metric(
        "weight_sync/canary_mean_logprob_diff", "nats", "last",
        "Mean of the absolute differences of the same tokens.",
    ),
    Metric(
        "weight_sync/canary_num_tokens", "tokens", "last",
        "Tokens that the canary compared, over all engines.",
    ),
    Metric(
        "weight_sync/{check}_seconds", "s", "sum",
        "Wall clock of a check on rank 0, within time/weight_sync_seconds: checksum (the policy's; "
        "the engine's side is part of the sync), resident, canary.",
    ),
    Metric(
        "memory/{kind}_bytes", "bytes", "last",
        "Peak memory of rank 0 since it started: host_peak on CPU (what is resident of the "
        "process), device_peak on GPU (what torch has allocated).",
    ),
    Metric(
        "memory/{phase}/{kind}_bytes", "bytes", "last",
        "Peak memory of rank 0 within a phase of the step (those of time/{phase}_seconds), what "
        "was there before included. Only where the kernel lets a process forget its peak.",
    ),
    Metric(
        "run/policy_version", "optimizer steps", "last",
        "Version of the weights that made the step's rollouts.",
    ),
    Metric("run/epoch", "epochs", "last", "Passes over data.train that were completed."),
)  # fmt: skip

_declared: dict[str, Metric] = {metric.name: metric for metric in METRICS}


def declare_metric(name: str, unit: str, definition: str, combine: Combine = "mean") -> None:
    """Add a metric, e.g. of an estimator of your own; see `Metric` for the arguments.

    Raises:
        ValueError: there is one of that name.
    """
    if name in _declared:
        raise ValueError(f"metric '{name}' is already declared")
    _declared[name] = Metric(name, unit, combine, definition)


def find_metric(name: str) -> Metric:
    """The declared metric that covers `name`.

    Raises:
        ValueError: there is none.
    """
    if name in _declared:
        return _declared[name]
    for metric in _declared.values():
        if metric.pattern.fullmatch(name):
            return metric
    raise ValueError(f"metric '{name}' is not declared; {did_you_mean(name, _declared)}")


# fsum raises on inf - inf, and max may hide a NaN.
_COMBINE: Mapping[Combine, Callable[[Sequence[float]], float]] = {
    "mean": lambda values: sum(values) / len(values),
    "max": lambda values: math.nan if any(map(math.isnan, values)) else max(values),
    "sum": sum,
    "last": lambda values: values[-1],
}


def combine_minibatches(minibatches: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Make the metrics of a step's minibatches those of the step, as each metric declares.

    A metric that some of them lack is combined over those that have it.
    """
    values: dict[str, list[float]] = {}
    for minibatch in minibatches:
        for name, value in minibatch.items():
            values.setdefault(name, []).append(float(value))
    return {name: _COMBINE[find_metric(name).combine](them) for name, them in values.items()}


class MetricsLogger:
    """Writes <run_dir>/metrics.jsonl, one JSON object per step, and TensorBoard.

    A value that is not finite is written as null: JSON knows no NaN, and a missing key would hide
    that the metric was there.

    Args:
        run_dir: folder of the run.
        tensorboard: also write <run_dir>/tensorboard.
        enabled: False on all ranks but one; names are checked all the same.
        start_step: the first step that will be logged. What an earlier attempt wrote from there on
            is dropped, from both files.

    Raises:
        InputError: the metrics.jsonl that is there cannot be read.
    """

    def __init__(
        self, run_dir: Path, *, tensorboard: bool = True, enabled: bool = True, start_step: int = 0
    ):
        self._file = None
        self._writer: SummaryWriter | None = None
        self._last_step = start_step - 1
        if not enabled:
            return
        path = run_dir / "metrics.jsonl"
        run_dir.mkdir(parents=True, exist_ok=True)
        _drop_steps_from(path, start_step)
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            # Takes a second to import, so only where it is used.
            from torch.utils.tensorboard.writer import SummaryWriter

            self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write all metrics of a step.

        Raises:
            ValueError: a name is not declared, or the step is not later than the last one.
        """
        for name in values:
            find_metric(name)
        if step <= self._last_step:
            raise ValueError(f"step {step} is logged after step {self._last_step}")
        self._last_step = step
        numbers = {name: float(value) for name, value in values.items()}
        if self._file is not None:
            finite = {name: it if math.isfinite(it) else None for name, it in numbers.items()}
            self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
            self._file.flush()
        if self._writer is not None:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, global_step=step)
            self._writer.flush()

    def close(self) -> None:
        """Close the files; nothing may be logged after."""
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _drop_steps_from(path: Path, start_step: int) -> None:
    """Keep the lines of earlier steps; a last line that a kill cut short goes too."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept: list[str] = []
    for number, line in enumerate(lines, start=1):
        try:
            step = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                continue
            raise InputError(f"{path}:{number}: no metrics of a step; remove the line") from error
        if step < start_step:
            kept.append(line if line.endswith("\n") else line + "\n")
    if kept != lines:
        write_atomically(path, "".join(kept))


def metrics_page() -> str:
    """The text of docs/metrics.md: all that is declared at the time, the table's groups first."""
    lines = [
        "# Metrics",
        "",
        "A run writes them to `<run_dir>/metrics.jsonl`, one JSON object per step, and to",
        "`<run_dir>/tensorboard` under the same names. A value that is not finite is `null` in the",
        "JSON. When a run resumes, what it had written for the steps that it repeats is dropped.",
        "",
        "`step` says how the minibatches (optimizer steps) of a step make its value. Means over",
        "tokens weigh every token alike within a minibatch. A share lies between 0 and 1.",
        "",
        "Metrics of your own estimators and losses: `declare_metric(name, unit, definition)` in",
        "`gdpo_megatron.observability.metrics`. A name that nobody declared is refused.",
        "",
        "This page is written from the code by `python tools/write_docs.py`.",
    ]
    groups: dict[str, list[Metric]] = {}
    for metric in _declared.values():
        groups.setdefault(metric.name.partition("/")[0], []).append(metric)
    for group, metrics in groups.items():
        header = "| metric | unit | step | definition |"
        lines += ["", f"## {group}", "", header, "|---|---|---|---|"]
        for metric in metrics:
            definition = metric.definition.replace("|", r"\|")
            lines.append(f"| `{metric.name}` | {metric.unit} | {metric.combine} | {definition} |")
    return "\n".join(lines) + "\n"
