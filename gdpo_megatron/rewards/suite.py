"""Scores a run's rollouts on the CPU while generation goes on, in processes that can be killed.

    submit(rollout) --+-- single, sync:   one job per rollout, for all such rewards
                      +-- single, async:  one job per rollout and reward
                      +-- batch:          one job per reward when the rollout's group is complete
    collect() waits for all of them --> RewardScores, ordered by sample_id

Rewards that keep state are the exception: their jobs start with `collect`, in order of sample_id.

The suite is the trainer's side: it writes jobs to a pipe and reads results from another. The pool
(pool.py) is a process of its own which hands the jobs to workers, minds their time and memory, and
kills and replaces what overruns. Each result goes to the cell it was computed for, so neither the
number of workers nor the order in which they finish shows in the scores.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from gdpo_megatron.config.sandbox import SandboxConfig
from gdpo_megatron.config.schema import RewardConfig, RewardSuiteConfig
from gdpo_megatron.data.schema import REWARDS_KEY
from gdpo_megatron.rewards.base import NOT_APPLICABLE, Invalid, RewardResult, RewardSample
from gdpo_megatron.rewards.plan import Plan, lanes_of
from gdpo_megatron.rewards.report import RewardReport
from gdpo_megatron.rewards.resolve import ResolvedReward, resolve_rewards
from gdpo_megatron.rewards.scores import RewardScores, build_scores
from gdpo_megatron.rewards.wire import decode_result, encode_metadata, encode_samples, line
from gdpo_megatron.types import Rollout

POOL_COMMAND = (sys.executable, "-m", "gdpo_megatron.rewards.pool")
_CLOSE_SECONDS = 10.0


@dataclass(slots=True)
class _Step:
    """What was submitted since the last `collect`.

    Args:
        samples: by sample_id.
        faults: sample_id -> why no reward can judge it: an engine's or environment's doing.
        groups: group_id -> sample_ids.
        rows_of_job: sample_ids of each job; a job's number is its place.
        results: (sample_id, column) -> result, as far as they have come.
    """

    samples: dict[int, RewardSample]
    faults: dict[int, Invalid]
    groups: dict[int, list[int]]
    rows_of_job: list[list[int]]
    results: dict[tuple[int, int], RewardResult]
    seconds: Counter[str]
    events: dict[str, Counter[str]]

    @classmethod
    def empty(cls) -> _Step:
        return cls({}, {}, {}, [], {}, Counter(), {})


class RewardSuite:
    """The rewards of a run.

    Args:
        rewards: the `rewards` section.
        group_size: rollouts per group; a batch reward is called when so many have been submitted.
        config: how they are run; the section's defaults where not given.
        sandbox: for rewards that run programs of the model.
        base_dir: folder that `./file.py:function` starts from.
        log_path: file for what rewards print; not given, that is dropped.

    Raises:
        InputError: see `resolve_rewards`. Processes start with `start` or the first `submit`.
    """

    def __init__(
        self,
        rewards: Sequence[RewardConfig],
        *,
        group_size: int,
        config: RewardSuiteConfig | None = None,
        sandbox: SandboxConfig | None = None,
        base_dir: Path | None = None,
        log_path: Path | None = None,
    ):
        config = config or RewardSuiteConfig()
        self.rewards = resolve_rewards(rewards, base_dir)
        self._group_size = group_size
        self._step_timeout = config.step_timeout_seconds
        self._plan = Plan(
            lanes=lanes_of(self.rewards, config.num_workers, config.max_concurrent_async),
            rewards=tuple({"name": r.name, "type": r.type, "args": dict(r.args)} for r in rewards),
            base_dir=str((base_dir or Path.cwd()).resolve()),
            sandbox=asdict(sandbox or SandboxConfig()),
            import_path=tuple(sys.path),
            sample_timeout_seconds=config.sample_timeout_seconds,
            memory_bytes=config.worker_memory_mb * 2**20,
            log_path=str(log_path.resolve()) if log_path is not None else None,
        )
        self._lane_of = {k: n for n, lane in enumerate(self._plan.lanes) for k in lane.columns}
        self._pool: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._step = _Step.empty()

    @property
    def names(self) -> tuple[str, ...]:
        """The reward names, in config order."""
        return tuple(reward.name for reward in self.rewards)

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each reward, by name, for the advantage stage."""
        return {reward.name: reward.weight for reward in self.rewards}

    def answer_problems(
        self, answer: str | None, metadata: Mapping[str, Any] | None = None
    ) -> list[str]:
        """Say why rewards could never score this answer; called for each row when data is loaded.

        Args:
            answer: the row's.
            metadata: its other fields; rewards that it does not name are not asked.

        Returns:
            One line per reward that refuses it; empty where the answer is good, or None.
        """
        problems: list[str] = []
        for reward in self.rewards:
            if not _applies(reward, metadata or {}):
                continue
            if reward.fn.check_answer is not None and answer is not None:
                try:
                    reward.fn.check_answer(answer)
                except (ValueError, RecursionError) as error:
                    problems.append(f"reward '{reward.name}': {error}")
        return problems

    def metadata_problems(self, metadata: Mapping[str, Any]) -> list[str]:
        """Say why a row's other fields will not do; empty where they will.

        They must be what JSON can hold, and where they name the rewards of the row, not leave out
        the condition of one.
        """
        try:
            encode_metadata(metadata)
        except (TypeError, ValueError) as error:
            return [f"its fields go to rewards as JSON: {error}; leave that column out"]
        own = [reward for reward in self.rewards if _applies(reward, metadata)]
        names = {reward.name for reward in own}
        return [
            f"field '{REWARDS_KEY}' names '{reward.name}' without '{reward.when.reward}', its "
            "condition: it would never apply; add that or leave both out"
            for reward in own
            if reward.when is not None and reward.when.reward not in names
        ]

    # ---- processes -------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the processes, if they are not there yet; returns at once.

        Raises:
            RuntimeError: the suite is closed.
        """
        if self._closed:
            raise RuntimeError("the reward suite is closed")
        if self._pool is None:
            self._pool = subprocess.Popen(
                POOL_COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # a Ctrl-C is the launcher's to handle
            )
            self._write(line(self._plan.as_json()))

    def close(self) -> None:
        """End the processes, and drop what is waiting."""
        self._closed = True
        pool, self._pool = self._pool, None
        if pool is None:
            return
        jobs, results = _pipes(pool)
        try:
            jobs.close()
        except OSError:  # a job that it was too dead to take
            pass
        try:
            pool.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            pool.kill()  # the kernel kills its workers
            pool.wait()
        results.close()

    def __enter__(self) -> RewardSuite:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _write(self, data: bytes) -> None:
        assert self._pool is not None
        jobs, _ = _pipes(self._pool)
        try:
            jobs.write(data)
            jobs.flush()
        except BrokenPipeError:
            raise self._dead() from None

    def _dead(self) -> RuntimeError:
        assert self._pool is not None
        code = self._pool.wait()
        return RuntimeError(f"the reward pool has ended with status {code}; see standard error")

    # ---- rollouts --------------------------------------------------------------------------------

    def submit(self, rollout: Rollout) -> None:
        """Start scoring a rollout; returns at once. All rollouts of a group go to one suite.

        Raises:
            ValueError: its sample_id, or all of its group, was submitted since the last `collect`.
            RuntimeError: the suite is closed, or its processes have ended.
        """
        self.start()
        sample_id, step = rollout.sample_id, self._step
        if sample_id in step.samples:
            raise ValueError(f"sample_id {sample_id} was submitted twice")
        group = step.groups.setdefault(rollout.group_id, [])
        if len(group) == self._group_size:
            raise ValueError(f"group {rollout.group_id} has more than {self._group_size} rollouts")
        step.samples[sample_id] = _sample_of(rollout)
        if rollout.completion.finish_reason == "abort":
            step.faults[sample_id] = Invalid("completion aborted")
        elif rollout.fault:
            step.faults[sample_id] = Invalid("environment fault", rollout.fault)
        group.append(sample_id)
        self._send([sample_id], batch=False, stateful=False)
        if len(group) == self._group_size:
            self._send(sorted(group), batch=True, stateful=False)

    def _send(self, rows: list[int], *, batch: bool, stateful: bool) -> None:
        """Send the jobs of a rollout or a group: one per lane, an async lane's one per reward."""
        samples = [self._step.samples[row] for row in rows]
        if not batch and rows[0] in self._step.faults:
            return  # part of an answer, and not by the policy's decision
        columns = [
            k
            for k, reward in enumerate(self.rewards)
            if reward.fn.batch == batch
            and reward.fn.stateful == stateful
            and _applies(reward, samples[0].metadata)  # one prompt, so all samples agree
        ]
        together: dict[int, list[int]] = {}
        alone: list[tuple[int, list[int]]] = []
        for k in columns:
            lane = self._lane_of[k]
            if batch or self._plan.lanes[lane].is_async:
                alone.append((lane, [k]))
            else:
                together.setdefault(lane, []).append(k)
        jobs = [*together.items(), *alone]
        if not jobs:
            return
        payload = encode_samples(samples)
        for lane, its_columns in jobs:
            header = {
                "job": len(self._step.rows_of_job),
                "lane": lane,
                "columns": its_columns,
                "num_samples": len(rows),
            }
            self._step.rows_of_job.append(rows)
            self._write(line(header) + payload)

    def drop(self, group_ids: Iterable[int]) -> None:
        """Leave groups out of the scores that `collect` returns, whatever was submitted of them."""
        for group in group_ids:
            for sample_id in self._step.groups.pop(group, ()):
                del self._step.samples[sample_id]
                self._step.faults.pop(sample_id, None)

    def collect(self) -> RewardScores:
        """Wait for all that was submitted since the last call, and return its scores.

        What is not done `reward_suite.step_timeout_seconds` after this call is invalid.

        Raises:
            RuntimeError: a worker could not find its rewards, or the pool has ended.
        """
        began, counts = time.perf_counter(), dict[str, int]()
        if self._step.samples or self._step.rows_of_job:
            self._send_stateful()
            self._write(line({"collect": self._step_timeout}))
            counts = self._read_results()
        step, self._step = self._step, _Step.empty()
        report = RewardReport(
            events={name: dict(events) for name, events in step.events.items()},
            seconds=dict(step.seconds),
            wait_seconds=time.perf_counter() - began,
            num_restarts=counts.get("restarts", 0),
            num_recycled=counts.get("recycled", 0),
            num_retries=counts.get("retries", 0),
        )
        return build_scores(self.rewards, self._table(step), report)

    def _send_stateful(self) -> None:
        for row in sorted(self._step.samples):
            self._send([row], batch=False, stateful=True)
        whole = (g for g in self._step.groups.values() if len(g) == self._group_size)
        for rows in sorted(map(sorted, whole)):
            self._send(rows, batch=True, stateful=True)

    def _read_results(self) -> dict[str, int]:
        """Read until all is there; returns the pool's counts."""
        assert self._pool is not None
        _, results = _pipes(self._pool)
        step = self._step
        for text in results:
            message: dict[str, Any] = json.loads(text)
            if "collected" in message:
                return message["collected"]
            if "failed" in message:
                raise RuntimeError(message["failed"])
            column = message["column"]
            name = self.rewards[column].name
            step.seconds[name] += message.get("seconds", 0.0)
            step.events.setdefault(name, Counter()).update(message.get("events", {}))
            rows = step.rows_of_job[message["job"]]
            for row, result in zip(rows, message["results"], strict=True):
                step.results[row, column] = decode_result(result)
        raise self._dead()

    def _table(self, step: _Step) -> dict[int, list[RewardResult]]:
        missing = Invalid("group incomplete", f"a batch reward needs {self._group_size} rollouts")

        def result(row: int, k: int) -> RewardResult:
            if not _applies(self.rewards[k], step.samples[row].metadata):
                return NOT_APPLICABLE
            return step.faults.get(row) or step.results.get((row, k), missing)

        return {row: [result(row, k) for k in range(len(self.rewards))] for row in step.samples}


def _applies(reward: ResolvedReward, metadata: Mapping[str, Any]) -> bool:
    """Whether a row is this reward's: it names no rewards, or this one among them."""
    names = metadata.get(REWARDS_KEY)
    return names is None or reward.name in names


def _pipes(pool: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert pool.stdin is not None and pool.stdout is not None
    return pool.stdin, pool.stdout


def _sample_of(rollout: Rollout) -> RewardSample:
    return RewardSample(
        completion=rollout.completion.text,
        prompt=rollout.prompt.text,
        answer=rollout.prompt.answer,
        metadata=rollout.prompt.metadata,
        num_tokens=rollout.num_tokens,
        finish_reason=rollout.completion.finish_reason,
        turns=tuple(
            {"text": it.text, "observation": it.observation, "rewards": dict(it.rewards)}
            for it in rollout.turns
        ),
    )
