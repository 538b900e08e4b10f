"""The `eval` section: which sets are evaluated, how, and what is reported of them.

A set says only what is its own. What it leaves null it takes from the section around it, so that
each default has one place.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gdpo_megatron.config.reward import RewardFnConfig
from gdpo_megatron.config.row_fields import RowFieldsConfig
from gdpo_megatron.config.sampling import SamplingConfig
from gdpo_megatron.config.section import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    UnitFloat,
    section,
)


@section
class CorrectConfig:
    """When a completion counts as right, for accuracy and pass@k."""

    reward: str
    """Name of the reward that says it."""

    gte: float = 1.0
    """It is right where that reward is at least this."""

    pass_at_k: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1,)
    """Report the chance that one of k completions is right, for each of these k (unbiased, from
    samples_per_prompt completions); k = 1 is the accuracy, avg@n."""


@section
class EvalSetSource:
    """What an evaluation set is made of."""

    name: str
    """Its name in metrics and files; unique."""

    data: str
    """Its rows, jsonl or parquet, relative to the config file."""


@section
class EvalSetConfig(RowFieldsConfig, EvalSetSource):
    """A named evaluation set; what is null here is as the section `eval` says."""

    rewards: tuple[str, ...] | None = None
    """Names of the rewards that score it, of `rewards` and `eval.rewards`; null means all of
    `rewards`. A row that names its own is scored by those of them alone."""

    correct: CorrectConfig | None = None
    """As eval.correct."""

    num_prompts: PositiveInt | None = None
    """As eval.num_prompts."""

    samples_per_prompt: PositiveInt | None = None
    """As eval.samples_per_prompt."""

    exceed_tokens: PositiveInt | None = None
    """As eval.exceed_tokens."""

    temperature: NonNegativeFloat | None = None
    """As eval.temperature."""

    top_p: UnitFloat | None = None
    """As eval.top_p."""

    top_k: NonNegativeInt | None = None
    """As eval.top_k."""

    max_completion_tokens: PositiveInt | None = None
    """As eval.max_completion_tokens."""

    stop: tuple[str, ...] | None = None
    """As eval.stop."""


@section
class EvalConfig(SamplingConfig):
    """Evaluation of data.eval and of named sets, by `eval` and train.eval_interval alike."""

    num_prompts: PositiveInt | None = None
    """Use the first so many rows of a set; null means all."""

    samples_per_prompt: PositiveInt = 1
    """Completions per prompt (n)."""

    sets: tuple[EvalSetConfig, ...] = ()
    """Named sets, beside data.eval."""

    rewards: tuple[RewardFnConfig, ...] = ()
    """Rewards that only evaluation asks for; sets name them."""

    correct: CorrectConfig | None = None
    """When a completion counts as right; null reports no accuracy. It is not reported of a set that
    the reward does not score."""

    format_reward: str | None = None
    """Name of the reward that is 1 where the format is right; reported as `format`, the share of
    completions where it is at least 1."""

    bug_reward: str | None = None
    """Name of the reward that is 1 where a program ran without an error; reported as `bug`, the
    share of completions where it is below 1."""

    exceed_tokens: PositiveInt | None = None
    """Report the share of completions longer than this many tokens; null does not."""

    num_bootstrap: PositiveInt = 2000
    """Resamples of a set's prompts that its intervals are taken from (percentiles, 95 %)."""

    num_completions_per_chunk: PositiveInt = 1024
    """Prompts are evaluated and written to disk in chunks of about so many completions; an
    evaluation that was ended goes on after the last of them. Engines that decode more than this
    side by side wait for each other at the end of each chunk."""

    label: str | None = None
    """Results are in <run_dir>/eval/<label>; null takes the name of the model's folder. Training
    takes step_<step>."""

    allow_train_overlap: bool = False
    """Let prompts be in data.train as well; else that is an error."""

    max_concurrent_sequences: PositiveInt = 256
    """Completions that one engine decodes at a time."""
