"""Runs the rewards of a run on the CPU while generation goes on.

    submit(rollout) --+-- single, sync:   one job per rollout, in a pool of threads
                      +-- single, async:  one task per rollout and reward, on one event loop
                      +-- batch:          one job per reward when the rollout's group is complete
    collect() waits for all of them --> RewardScores, ordered by sample_id

A job never raises: whatever goes wrong inside a reward becomes an `Invalid` of its rows. Each
result goes to the cell it was computed for, so neither the size of the pool nor the order in which
jobs finish shows in the scores. There is no time limit: a reward that never returns blocks
`collect`.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import traceback
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from gdpo_megatron.config.schema import RewardConfig
from gdpo_megatron.rewards.base import (
    Invalid,
    RewardResult,
    RewardSample,
    as_result,
    plain_value,
)
from gdpo_megatron.rewards.resolve import ResolvedReward, resolve_rewards
from gdpo_megatron.rewards.scores import RewardScores, build_scores
from gdpo_megatron.types import Rollout


@dataclass(frozen=True, slots=True)
class _Job:
    """A future with one result for each (sample_id, column) in `cells`."""

    future: Future[list[RewardResult]]
    cells: Sequence[tuple[int, int]]


class RewardSuite:
    """The rewards of a run.

    Args:
        rewards: the `rewards` section.
        group_size: rollouts per group; a batch reward is called when so many have been submitted.
        num_workers: threads for sync rewards. Functions must bear being called from several
            threads, or num_workers be 1. Async rewards of all rollouts run at once.
        base_dir: folder that `./file.py:function` starts from.

    Raises:
        InputError: see `resolve_rewards`. Threads start with the first `submit`.
    """

    def __init__(
        self,
        rewards: Sequence[RewardConfig],
        *,
        group_size: int,
        num_workers: int,
        base_dir: Path | None = None,
    ):
        self.rewards = resolve_rewards(rewards, base_dir)
        self._group_size = group_size
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="reward")
        self._loop: _EventLoopThread | None = None
        self._samples: dict[int, RewardSample] = {}
        self._groups: dict[int, list[int]] = {}
        self._jobs: list[_Job] = []

    @property
    def names(self) -> tuple[str, ...]:
        """The reward names, in config order."""
        return tuple(reward.name for reward in self.rewards)

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each reward, by name, for the advantage stage."""
        return {reward.name: reward.weight for reward in self.rewards}

    def answer_problems(self, answer: str | None) -> list[str]:
        """Say why rewards could never score this answer; called for each row when data is loaded.

        Returns:
            One line per reward that refuses it; empty where the answer is good, or None.
        """
        problems: list[str] = []
        for reward in self.rewards:
            if reward.fn.check_answer is not None and answer is not None:
                try:
                    reward.fn.check_answer(answer)
                except ValueError as error:
                    problems.append(f"reward '{reward.name}': {error}")
        return problems

    def submit(self, rollout: Rollout) -> None:
        """Start scoring a rollout; returns at once. All rollouts of a group go to one suite.

        Raises:
            ValueError: its sample_id, or all of its group, was submitted since the last `collect`.
        """
        sample_id = rollout.sample_id
        if sample_id in self._samples:
            raise ValueError(f"sample_id {sample_id} was submitted twice")
        group = self._groups.setdefault(rollout.group_id, [])
        if len(group) == self._group_size:
            raise ValueError(f"group {rollout.group_id} has more than {self._group_size} rollouts")
        sample = _sample_of(rollout)
        self._samples[sample_id] = sample
        group.append(sample_id)
        if sample.finish_reason != "abort":
            self._start_single(sample_id, sample)
        if len(group) == self._group_size:
            self._start_batch(sorted(group))

    def collect(self) -> RewardScores:
        """Wait for all that was submitted since the last call, and return its scores."""
        missing = Invalid("group incomplete", f"a batch reward needs {self._group_size} rollouts")
        results: dict[int, list[RewardResult]] = {
            sample_id: [missing] * len(self.rewards) for sample_id in self._samples
        }
        for job in self._jobs:
            for (sample_id, column), result in zip(job.cells, job.future.result(), strict=True):
                results[sample_id][column] = result
        for sample_id, sample in self._samples.items():
            if sample.finish_reason == "abort":
                # Part of an answer: the engine's decision, not the policy's.
                results[sample_id] = [Invalid("completion aborted")] * len(self.rewards)
        self._samples, self._groups, self._jobs = {}, {}, []
        return build_scores(self.rewards, results)

    def close(self) -> None:
        """Drop what is waiting, and stop the threads when their present job is done."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._loop is not None:
            self._loop.close()

    def __enter__(self) -> RewardSuite:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()

    def _start_single(self, sample_id: int, sample: RewardSample) -> None:
        single = [(k, reward) for k, reward in enumerate(self.rewards) if not reward.fn.batch]
        sync = [(k, reward) for k, reward in single if not reward.fn.is_async]
        if sync:
            future = self._pool.submit(_score_sync, [reward for _, reward in sync], sample)
            self._jobs.append(_Job(future, [(sample_id, k) for k, _ in sync]))
        for k, reward in single:
            if reward.fn.is_async:
                future = self._run_async(_score_async(reward, sample))
                self._jobs.append(_Job(future, [(sample_id, k)]))

    def _start_batch(self, group: Sequence[int]) -> None:
        samples = [self._samples[sample_id] for sample_id in group]
        for k, reward in enumerate(self.rewards):
            if not reward.fn.batch:
                continue
            if reward.fn.is_async:
                future = self._run_async(_score_batch_async(reward, samples))
            else:
                future = self._pool.submit(_score_batch, reward, samples)
            self._jobs.append(_Job(future, [(sample_id, k) for sample_id in group]))

    def _run_async(
        self, coroutine: Coroutine[Any, Any, list[RewardResult]]
    ) -> Future[list[RewardResult]]:
        if self._loop is None:
            self._loop = _EventLoopThread()
        return self._loop.run(coroutine)


class _EventLoopThread:
    """One event loop on a thread of its own; closing it cancels the tasks that are left."""

    _loop: asyncio.AbstractEventLoop
    _stop: asyncio.Event

    def __init__(self):
        ready = threading.Event()

        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            self._stop = asyncio.Event()
            ready.set()
            await self._stop.wait()

        self._thread = threading.Thread(
            target=lambda: asyncio.run(serve()), name="reward-async", daemon=True
        )
        self._thread.start()
        ready.wait()

    def run(self, coroutine: Coroutine[Any, Any, list[RewardResult]]) -> Future[list[RewardResult]]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            # A task that blocks or refuses to be cancelled must not keep the run from ending.
            self._thread.join(timeout=1.0)


def _sample_of(rollout: Rollout) -> RewardSample:
    return RewardSample(
        completion=rollout.completion.text,
        prompt=rollout.prompt.text,
        answer=rollout.prompt.answer,
        metadata=rollout.prompt.metadata,
        num_tokens=len(rollout.completion.token_ids),
        finish_reason=rollout.completion.finish_reason,
    )


# The four below are where user code runs. They catch BaseException: a sys.exit() in a reward would
# otherwise end a worker thread, or the event loop, instead of making a row invalid.


def _score_sync(rewards: Sequence[ResolvedReward], sample: RewardSample) -> list[RewardResult]:
    results: list[RewardResult] = []
    for reward in rewards:
        try:
            results.append(_checked(reward.fn.function(sample, **reward.args)))
        except BaseException as error:
            results.append(_fault(error))
    return results


async def _score_async(reward: ResolvedReward, sample: RewardSample) -> list[RewardResult]:
    try:
        return [_checked(await reward.fn.function(sample, **reward.args))]
    except BaseException as error:
        return [_fault(error)]


def _score_batch(reward: ResolvedReward, samples: Sequence[RewardSample]) -> list[RewardResult]:
    try:
        return _checked_all(reward.fn.function(samples, **reward.args), len(samples))
    except BaseException as error:
        return [_fault(error)] * len(samples)


async def _score_batch_async(
    reward: ResolvedReward, samples: Sequence[RewardSample]
) -> list[RewardResult]:
    try:
        return _checked_all(await reward.fn.function(samples, **reward.args), len(samples))
    except BaseException as error:
        return [_fault(error)] * len(samples)


def _checked(value: object) -> RewardResult:
    if inspect.iscoroutine(value):
        value.close()  # never to be awaited: without this, a warning from the interpreter
        return Invalid("returned coroutine", "declare the function with 'async def'")
    return as_result(value)


def _checked_all(values: object, num_samples: int) -> list[RewardResult]:
    if inspect.iscoroutine(values):
        return [_checked(values)] * num_samples
    values = plain_value(values)
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        fault = Invalid(f"returned {type(values).__name__}", "a batch reward returns a list")
        return [fault] * num_samples
    results = [_checked(value) for value in cast("Sequence[object]", values)]
    if len(results) != num_samples:
        detail = f"{len(results)} results for {num_samples} samples"
        return [Invalid("wrong number of results", detail)] * num_samples
    return results


def _fault(error: BaseException) -> Invalid:
    try:
        message = str(error)
    except Exception:
        message = "(its message cannot be shown)"
    return Invalid(
        f"raised {type(error).__name__}",
        message if len(message) <= 200 else f"{message[:200]}...",
        "".join(traceback.format_exception(error)),
    )
