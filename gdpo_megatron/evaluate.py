"""Held-out evaluation: completions of data.eval, their rewards, and standard errors.

The sampling noise of evaluation does not depend on the step, so two evaluations of a run, or of
two runs with the same seed, see the same noise and differ by the weights alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gdpo_megatron.build import Parts
from gdpo_megatron.config.paths import resolve_path
from gdpo_megatron.config.schema import RLConfig
from gdpo_megatron.conversion.mapping import hf_shapes
from gdpo_megatron.data.prompts import load_prompts
from gdpo_megatron.distributed.mesh import EngineMesh
from gdpo_megatron.observability.files import write_atomically
from gdpo_megatron.observability.progress import ProgressDisplay
from gdpo_megatron.rewards.breaker import TooManyInvalid
from gdpo_megatron.rewards.suite import RewardSuite
from gdpo_megatron.rollout.base import RolloutEngine
from gdpo_megatron.rollout.runner import RolloutBatch, run_rollouts, sampling_params
from gdpo_megatron.rollout.stall import StallLimit


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """What an evaluation found.

    Args:
        num_prompts: prompts.
        samples_per_prompt: completions of each.
        means: mean of each reward over its valid entries; NaN where it has none.
        standard_errors: of these means, prompts taken as independent.
        num_invalid: entries of each reward without a score, not counting not applicable ones.
        mean_tokens: mean length of the completions.
        truncated_share: completions cut at the limit.
        broken: what ends the job: rewards that were invalid too often.
    """

    num_prompts: int
    samples_per_prompt: int
    means: dict[str, float]
    standard_errors: dict[str, float]
    num_invalid: dict[str, int]
    mean_tokens: float
    truncated_share: float
    broken: TooManyInvalid | None = None

    def metrics(self) -> dict[str, float]:
        """As logged during training."""
        values: dict[str, float] = {"eval/mean_tokens": self.mean_tokens}
        for name, mean in self.means.items():
            values[f"eval/{name}/mean"] = mean
            values[f"eval/{name}/standard_error"] = self.standard_errors[name]
        return values

    def as_text(self) -> str:
        """A line for each reward."""
        width = max(map(len, self.means))
        lines = [f"{self.num_prompts} prompts x {self.samples_per_prompt}:"]
        for name, mean in self.means.items():
            failed = f", {self.num_invalid[name]} invalid" if self.num_invalid[name] else ""
            error = self.standard_errors[name]
            lines.append(f"  {name:{width}}  {mean:7.3f} \u00b1 {error:.3f}{failed}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """As written to a file."""
        return {field: getattr(self, field) for field in self.__slots__ if field != "broken"}


class Evaluator:
    """Evaluates what an engine has loaded. Construction reads data.eval.

    Args:
        config: the run's config.
        base_dir: folder that its relative paths start from.
        parts: what the job was given.
        engine: this rank's engine.
        engines: its mesh.
        stall: when its generation counts as stalled.
    """

    def __init__(
        self,
        config: RLConfig,
        base_dir: Path,
        parts: Parts,
        engine: RolloutEngine,
        engines: EngineMesh,
        stall: StallLimit,
    ):
        assert config.data.eval is not None, "validation requires data.eval"
        self._config, self._parts, self._engine, self._engines = config, parts, engine, engines
        self._stall = stall
        prompts = load_prompts(
            config.data,
            parts.tokenizer,
            path=config.data.eval,
            base_dir=base_dir,
            max_prompt_tokens=config.model.max_sequence_length - config.eval.max_completion_tokens,
        )
        self.prompts = prompts[: config.eval.num_prompts]
        self._base_dir = base_dir
        run_dir = resolve_path(base_dir, config.run_dir)
        self._log_path = run_dir / f"rewards_{parts.mesh.rank}.log"

    def run(self, on_progress: Callable[[int, int], None]) -> EvalResult:
        """Generate and score; collective."""
        config, samples = self._config, self._config.eval.samples_per_prompt
        with RewardSuite(
            config.rewards,
            group_size=samples,
            config=config.reward_suite,
            sandbox=config.sandbox,
            base_dir=self._base_dir,
            log_path=self._log_path,
        ) as suite:
            batch = run_rollouts(
                self.prompts,
                group_size=samples,
                sampling=sampling_params(config.eval, self._parts.stop_token_ids()),
                engine=self._engine,
                engines=self._engines,
                suite=suite,
                platform=self._parts.platform,
                seed=config.seed,
                stream="eval",
                step=0,
                stall=self._stall,
                on_progress=on_progress,
            )
        try:
            batch.check_invalid(config.reward_suite.max_invalid_fraction)
        except TooManyInvalid as error:
            return replace(summarise(batch, samples), broken=error)
        return summarise(batch, samples)


def summarise(batch: RolloutBatch, samples_per_prompt: int) -> EvalResult:
    """Means and standard errors of a batch of rollouts."""
    rewards = batch.rewards
    means: dict[str, float] = {}
    errors: dict[str, float] = {}
    invalid: dict[str, int] = {}
    for column, name in enumerate(rewards.names):
        valid = rewards.valid[:, column].reshape(-1, samples_per_prompt)
        values = rewards.values[:, column].double().reshape(-1, samples_per_prompt)
        values = values.masked_fill(~valid, 0.0)
        counts = valid.sum(1)
        per_prompt = (values.sum(1) / counts)[counts > 0]
        means[name] = float(values.sum() / counts.sum())
        spread = float(per_prompt.std()) if len(per_prompt) > 1 else float("nan")
        errors[name] = spread / max(1, len(per_prompt)) ** 0.5
        invalid[name] = int((~rewards.valid & ~batch.not_applicable)[:, column].sum())
    return EvalResult(
        num_prompts=len(batch.lengths) // samples_per_prompt,
        samples_per_prompt=samples_per_prompt,
        means=means,
        standard_errors=errors,
        num_invalid=invalid,
        mean_tokens=float(batch.lengths.double().mean()),
        truncated_share=batch.finish_share("length"),
    )


def run_eval(config: RLConfig, base_dir: Path, parts: Parts) -> EvalResult:
    """The `eval` job: evaluate the model of the config; rank 0 writes <run_dir>/eval.json."""
    engine, engines = parts.engine(config.rollout, config.eval.max_concurrent_sequences)
    run_dir = resolve_path(base_dir, config.run_dir)
    stall = StallLimit(
        seconds=config.rollout.stall_timeout_seconds,
        folder=run_dir,
        goes_on=lambda: "the same command evaluates again",
    )
    evaluator = Evaluator(config, base_dir, parts, engine, engines, stall)
    leads = parts.mesh.rank == 0
    with ProgressDisplay(1, 0, f"gdpo-megatron eval: {parts.folder}", enabled=leads) as display:
        display.phase("eval")
        engine.wake()
        reader = parts.reader()
        engine.load_weights(((name, reader.get(name)) for name in hf_shapes(parts.arch)), 0)
        result = evaluator.run(display.progress)
        if result.broken is not None:
            raise result.broken
        display.step_done(1, {**result.means, "tokens": result.mean_tokens})
    if leads:
        run_dir.mkdir(parents=True, exist_ok=True)
        record = {"model": str(parts.folder), **result.as_json()}
        write_atomically(run_dir / "eval.json", json.dumps(record, indent=2) + "\n")
    return result
