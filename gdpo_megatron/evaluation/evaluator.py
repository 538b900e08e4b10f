"""Completions of evaluation sets, their rewards, and what is reported of them.

A set is evaluated in chunks of prompts. The sampling noise of a completion is named by its set,
prompt and sample alone, not by step or chunk: two evaluations with one seed see the same noise and
differ by the weights; one that was ended and goes on finds what it would have found. Rank 0 has
the completions on disk and makes the results from there, whether it has just written them or not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gdpo_megatron.build import Parts
from gdpo_megatron.config.paths import resolve_path
from gdpo_megatron.config.schema import RLConfig
from gdpo_megatron.distributed.exchange import gather_texts
from gdpo_megatron.distributed.mesh import EngineMesh
from gdpo_megatron.errors import InputError
from gdpo_megatron.evaluation.loaded import LoadedSet, evaluation_folder, load_set
from gdpo_megatron.evaluation.report import SetResult, summarise
from gdpo_megatron.evaluation.sets import EvalSet, resolve_sets
from gdpo_megatron.evaluation.store import SetStore
from gdpo_megatron.observability.files import write_atomically
from gdpo_megatron.rewards.breaker import TooManyInvalid
from gdpo_megatron.rewards.suite import RewardSuite
from gdpo_megatron.rollout.base import RolloutEngine
from gdpo_megatron.rollout.episodes import EnvironmentRuntime
from gdpo_megatron.rollout.runner import RolloutBatch, run_rollouts, sampling_params
from gdpo_megatron.rollout.stall import StallLimit

RESULTS_FILE = "results.json"

_GATHERED_AT_ONCE = 64
"""Completions of an engine that are sent to rank 0 together; bounds the memory of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What has been evaluated.

    Args:
        results: of the sets that are whole; on rank 0 alone.
        is_complete: all sets are whole.
        broken: what ends the job: rewards that were invalid too often; the same on all ranks.
    """

    results: list[SetResult] = field(default_factory=list[SetResult])
    is_complete: bool = True
    broken: TooManyInvalid | None = None

    def metrics(self) -> dict[str, float]:
        """As logged in a training step."""
        return {name: value for it in self.results for name, value in it.metrics().items()}


class Evaluator:
    """Evaluates what an engine has loaded. Construction reads the sets.

    Args:
        config: the run's config.
        base_dir: folder that its relative paths start from.
        parts: what the job was given.
        engine: this rank's engine.
        engines: its mesh.
        stall: when its generation counts as stalled.
        environment: what answers the model between its turns, as in training.
    """

    def __init__(
        self,
        config: RLConfig,
        base_dir: Path,
        parts: Parts,
        engine: RolloutEngine,
        engines: EngineMesh,
        stall: StallLimit,
        environment: EnvironmentRuntime | None,
    ):
        self._config, self._base_dir, self._parts = config, base_dir, parts
        self._engine, self._engines, self._stall = engine, engines, stall
        self._environment = environment
        self._leads = parts.mesh.rank == 0
        self.sets = [load_set(it, config, base_dir, parts.tokenizer) for it in resolve_sets(config)]
        run_dir = resolve_path(base_dir, config.run_dir)
        self._log_path = run_dir / f"rewards_{parts.mesh.rank}.log"

    @property
    def num_chunks(self) -> int:
        """Of all sets."""
        return sum(len(it.chunks(self._config)) for it in self.sets)

    def run(
        self,
        label: str,
        about: Mapping[str, Any],
        *,
        weights: str | None = None,
        goes_on: bool,
        on_progress: Callable[[int, int], None],
        on_chunk: Callable[[str, int], None] = lambda name, number: None,
        is_over: Callable[[], bool] = lambda: False,
    ) -> Evaluation:
        """Generate and score what is not on disk yet; collective.

        Args:
            label: names the folder of the results.
            about: where the weights come from, for the results.
            weights: digest of the weights, which completions depend on; needed to go on.
            goes_on: take what an earlier evaluation with the same label has left; else it is
                removed.
            on_progress: called with (done, total) completions of this engine, within a chunk.
            on_chunk: called with each set's name and its number of chunks done, those on disk
                included, whenever it grows.
            is_over: asked after each chunk, on all ranks alike, whether to end there.

        Raises:
            InputError: what is on disk was made with something else.
            EngineFailure: see run_groups.
        """
        config = self._config
        assert weights is not None or not goes_on
        about = about if weights is None else {**about, "weights_sha256": weights}
        folder = evaluation_folder(config, self._base_dir, label)
        stores = [SetStore(folder, it.eval_set.name) for it in self.sets]
        results: list[SetResult] = []
        dones = self._begin(stores, weights, goes_on=goes_on)
        for it, store, done in zip(self.sets, stores, dones, strict=True):
            chunks = it.chunks(config)
            num_done = sum(end <= done for _, end in chunks)
            on_chunk(it.eval_set.name, num_done)
            with self._suite(it.eval_set) as suite:
                for number, (first, end) in enumerate(chunks[num_done:], num_done + 1):
                    if is_over():
                        return Evaluation(results=results, is_complete=False)
                    batch = self._generate(it, suite, first, end, on_progress)
                    try:
                        batch.check_invalid(config.reward_suite.max_invalid_fraction)
                    except TooManyInvalid as error:
                        return Evaluation(results=results, is_complete=False, broken=error)
                    self._write(store, it.eval_set, batch, first, end)
                    on_chunk(it.eval_set.name, number)
            if self._leads:
                results.append(self._result(it, store))
                self._write_results(folder, label, about, results)
        return Evaluation(results=results)

    def _begin(
        self, stores: Sequence[SetStore], weights: str | None, *, goes_on: bool
    ) -> list[int]:
        """Open the sets' files on rank 0; returns how many prompts are done of each."""
        told: dict[str, Any] = {}
        if self._leads:
            try:
                told["done"] = [
                    store.open({"weights_sha256": weights, **it.identity}, goes_on=goes_on)
                    for it, store in zip(self.sets, stores, strict=True)
                ]
            except InputError as error:
                told["problems"] = error.problems
        told = json.loads(gather_texts(json.dumps(told), self._parts.platform.device)[0])
        if "problems" in told:
            raise InputError(told["problems"])
        return told["done"]

    def _suite(self, eval_set: EvalSet) -> RewardSuite:
        """Its processes start with the first completion."""
        config = self._config
        return RewardSuite(
            eval_set.rewards,
            group_size=eval_set.samples_per_prompt,
            config=config.reward_suite,
            sandbox=config.sandbox,
            base_dir=self._base_dir,
            log_path=self._log_path,
        )

    def _generate(
        self,
        it: LoadedSet,
        suite: RewardSuite,
        first: int,
        end: int,
        on_progress: Callable[[int, int], None],
    ) -> RolloutBatch:
        return run_rollouts(
            it.prompts[first:end],
            first_group=first,
            group_size=it.eval_set.samples_per_prompt,
            sampling=sampling_params(it.eval_set.sampling, self._parts.stop_token_ids()),
            engine=self._engine,
            engines=self._engines,
            suite=suite,
            platform=self._parts.platform,
            seed=self._config.seed,
            stream=it.eval_set.noise_stream,
            step=0,
            environment=self._environment,
            stall=self._stall,
            on_progress=on_progress,
        )

    def _write(
        self, store: SetStore, eval_set: EvalSet, batch: RolloutBatch, first: int, end: int
    ) -> None:
        """Bring a chunk's completions to rank 0 and write them; collective."""
        size = eval_set.samples_per_prompt
        own = [
            _record(batch, sample, sample - first * size, size) for sample in sorted(batch.rollouts)
        ]
        most = max(map(batch.replica_of.count, set(batch.replica_of)))
        records: list[dict[str, Any]] = []
        for start in range(0, most, _GATHERED_AT_ONCE):
            text = json.dumps(own[start : start + _GATHERED_AT_ONCE])
            for told in gather_texts(text, self._parts.platform.device):
                records += json.loads(told) if self._leads else []
        if self._leads:
            records.sort(key=lambda it: (it["prompt"], it["sample"]))
            store.append(records, num_prompts=end, events=batch.report.events)

    def _result(self, it: LoadedSet, store: SetStore) -> SetResult:
        return summarise(
            it.eval_set,
            self._config.eval,
            store.records(),
            identity=it.identity,
            num_left_out=it.num_left_out,
            events=store.events(),
            seed=self._config.seed,
        )

    def _write_results(
        self, folder: Path, label: str, about: Mapping[str, Any], results: Sequence[SetResult]
    ) -> None:
        record = {
            "label": label,
            **about,
            "num_bootstrap": self._config.eval.num_bootstrap,
            "sets": {it.eval_set.name: it.as_json() for it in results},
        }
        write_atomically(folder / RESULTS_FILE, json.dumps(record, indent=2) + "\n")


def _record(batch: RolloutBatch, sample: int, row: int, size: int) -> dict[str, Any]:
    """What is kept of a completion; `unscored` says why a reward has no value."""
    rollout, rewards = batch.rollouts[sample], batch.rewards
    valid: list[bool] = rewards.valid[row].tolist()
    values: list[float] = rewards.values[row].tolist()
    cells = list(zip(rewards.names, values, valid, strict=True))
    unscored = {name: batch.reasons[sample, name] for name, _, there in cells if not there}
    return {
        "prompt_id": rollout.prompt.prompt_id,
        "prompt": sample // size,
        "sample": sample % size,
        "text": rollout.completion.text,
        "num_tokens": rollout.num_tokens,
        "finish_reason": rollout.completion.finish_reason,
        "rewards": {name: value if there else None for name, value, there in cells},
        **({"unscored": unscored} if unscored else {}),
    }
