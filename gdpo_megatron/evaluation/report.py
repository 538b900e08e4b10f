"""What an evaluation found: as JSON, as lines for a person, as metrics of a training step.

A figure is only worth something with what it was made with, so that stands beside it: n, sampling,
limits, the hash of the data, and how much was cut off, left out or could not be judged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gdpo_megatron.config.evaluation import EvalConfig
from gdpo_megatron.evaluation.quantities import Estimate, ScoredSample, estimate, per_prompt_values
from gdpo_megatron.evaluation.sets import EvalSet
from gdpo_megatron.rewards.base import NotApplicable
from gdpo_megatron.rewards.report import TIMEOUTS

_INFRASTRUCTURE = (*TIMEOUTS, "sandbox", "verifier", "worker", "memory limit", "environment fault")
"""Reasons that begin so are the machine's, not the reward's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """Completions that a reward gave no score.

    Args:
        num_not_applicable: that it does not concern.
        num_invalid: that it could not judge.
        reasons: why, with how many.
    """

    num_not_applicable: int
    num_invalid: int
    reasons: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class SetResult:
    """Of one set.

    Args:
        eval_set: what was evaluated.
        identity: what its completions and scores depend on; plain values.
        num_prompts: that were evaluated.
        num_left_out: rows of the file whose prompts are too long.
        estimates: by quantity.
        missing: by reward.
        infrastructure_share: of completions that some reward could not judge because of the
            machine.
        events: what rewards counted, by reward.
    """

    eval_set: EvalSet
    identity: Mapping[str, Any]
    num_prompts: int
    num_left_out: int
    estimates: Mapping[str, Estimate]
    missing: Mapping[str, Missing]
    infrastructure_share: float
    events: Mapping[str, Mapping[str, int]]

    def as_json(self) -> dict[str, Any]:
        """All of it, plain values."""
        correct = self.eval_set.correct
        return {
            **self.identity,
            "data": {"path": self.eval_set.path, **self.identity["data"]},
            "num_left_out": self.num_left_out,
            "correct": None if correct is None else {"reward": correct.reward, "gte": correct.gte},
            "exceed_tokens": self.eval_set.exceed_tokens,
            "quantities": {name: asdict(it) for name, it in self.estimates.items()},
            "missing": {name: asdict(it) for name, it in self.missing.items()},
            "infrastructure_share": self.infrastructure_share,
            "events": self.events,
        }

    def metrics(self) -> dict[str, float]:
        """As logged in a training step; a quantity without value is left out."""
        prefix, values = self.eval_set.metric_prefix, dict[str, float]()
        for name, it in self.estimates.items():
            kind, _, reward = name.partition("/")
            where = f"{prefix}/{reward}/mean" if kind == "reward" else f"{prefix}/{name}"
            if it.mean is not None:
                values[where] = it.mean
            if kind == "reward" and it.standard_error is not None:
                values[f"{prefix}/{reward}/standard_error"] = it.standard_error
        num_samples = self.num_prompts * self.eval_set.samples_per_prompt
        num_invalid = sum(it.num_invalid for it in self.missing.values())
        values[f"{prefix}/invalid_share"] = num_invalid / (num_samples * len(self.missing))
        return values

    def as_text(self) -> str:
        """A few lines: what was done, a line for each quantity, what is to be known besides."""
        sampling, n = self.eval_set.sampling, self.eval_set.samples_per_prompt
        how = "greedy"
        if sampling.temperature:
            how = f"T {sampling.temperature:g}, top_p {sampling.top_p:g}"
            how += f", top_k {sampling.top_k}" if sampling.top_k else ""
        lines = [
            f"{self.eval_set.name}: {self.num_prompts} prompts x {n}, {how}, "
            f"at most {sampling.max_completion_tokens} tokens"
        ]
        width = max(map(len, self.estimates))
        lines += [f"  {name:{width}}  {_figure(it)}" for name, it in self.estimates.items()]
        if self.num_left_out:
            lines.append(f"  rows left out, their prompts being too long: {self.num_left_out}")
        for name, it in self.missing.items():
            if it.num_invalid:
                why = ", ".join(f"{reason} ({count})" for reason, count in it.reasons.items())
                lines.append(f"  {name}: {it.num_invalid} completions could not be judged: {why}")
        for name, counts in self.events.items():
            told = ", ".join(f"{event} {count}" for event, count in counts.items())
            lines.append(f"  {name} counted: {told}")
        return "\n".join(lines)


def summarise(
    eval_set: EvalSet,
    section: EvalConfig,
    records: Iterable[Mapping[str, Any]],
    *,
    identity: Mapping[str, Any],
    num_left_out: int,
    events: Mapping[str, Mapping[str, int]],
    seed: int,
) -> SetResult:
    """Make a set's result from its completions.

    Args:
        eval_set: what was evaluated.
        section: the config's `eval`.
        records: of all completions, in order; see evaluator.py.
        identity: what they depend on.
        num_left_out: rows whose prompts are too long.
        events: what rewards counted.
        seed: of the bootstrap.
    """
    samples: list[ScoredSample] = []
    reasons = {name: Counter[str]() for name in eval_set.reward_names}
    num_not_applicable = dict.fromkeys(eval_set.reward_names, 0)
    num_infrastructure = 0
    for record in records:
        samples.append(
            ScoredSample(
                num_tokens=record["num_tokens"],
                finish_reason=record["finish_reason"],
                rewards=record["rewards"],
            )
        )
        unscored: Mapping[str, str] = record.get("unscored", {})
        num_infrastructure += any(why.startswith(_INFRASTRUCTURE) for why in unscored.values())
        for name, why in unscored.items():
            if why == NotApplicable.NOT_APPLICABLE.value:
                num_not_applicable[name] += 1
            else:
                reasons[name][why.partition(": ")[0]] += 1
    values = per_prompt_values(
        _by_prompt(samples, eval_set.samples_per_prompt),
        rewards=eval_set.reward_names,
        correct=eval_set.correct,
        exceed_tokens=eval_set.exceed_tokens,
        format_reward=section.format_reward,
        bug_reward=section.bug_reward,
    )
    return SetResult(
        eval_set=eval_set,
        identity=identity,
        num_prompts=len(samples) // eval_set.samples_per_prompt,
        num_left_out=num_left_out,
        estimates={
            name: estimate(it, num_bootstrap=section.num_bootstrap, seed=seed)
            for name, it in values.items()
        },
        missing={
            name: Missing(
                num_not_applicable=num_not_applicable[name],
                num_invalid=sum(it.values()),
                reasons=dict(sorted(it.items())),
            )
            for name, it in reasons.items()
        },
        infrastructure_share=num_infrastructure / len(samples),
        events=events,
    )


def as_table(results: Sequence[SetResult]) -> str:
    """What a person is shown at the end."""
    return "\n".join(result.as_text() for result in results)


def _by_prompt(samples: Sequence[ScoredSample], size: int) -> list[Sequence[ScoredSample]]:
    return [samples[first : first + size] for first in range(0, len(samples), size)]


def _figure(it: Estimate) -> str:
    """`0.843 +- 0.012  [0.819, 0.866]`, with the prompts behind it where these are not all."""
    if it.mean is None:
        return "-"
    digits = 1 if abs(it.mean) >= 100 else 3
    text = f"{it.mean:8.{digits}f}"
    if it.standard_error is not None and it.interval is not None:
        low, high = it.interval
        text += f" \u00b1 {it.standard_error:.{digits}f}  [{low:.{digits}f}, {high:.{digits}f}]"
    return text
