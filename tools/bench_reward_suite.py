"""What running rewards in killable processes costs over calling them: microseconds and percent.

    python tools/bench_reward_suite.py

A rollout is judged by three rewards: two that cost next to nothing and one that computes for a
given time, as a parser, a verifier or a sandboxed program would. Times are processor time: of the
trainer's process, the pool and its one worker together, against the same calls in a loop. They say
the same on a busy machine. Wall clock, which does not, is shown beside them; medians of rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from gdpo_megatron.config.schema import RewardConfig, RewardSuiteConfig
from gdpo_megatron.rewards import RewardSample
from gdpo_megatron.rewards.suite import RewardSuite
from gdpo_megatron.types import Completion, Prompt, Rollout

GROUP_SIZE = 8
COMPLETION = "<think>" + "so the answer must be this one " * 60 + "</think>\n<answer>18</answer>"


def computes(sample: RewardSample, milliseconds: float) -> float:
    """Computes for so much processor time, and allocates a little as it goes."""
    end = time.process_time() + milliseconds / 1000
    total = 0
    while time.process_time() < end:
        total += len(sample.completion.split())
    return float(total >= 0)


@dataclass(frozen=True)
class Seconds:
    """Of one way to judge a round's rollouts.

    Args:
        wall: by the clock.
        processor: of all processes that take part.
        trainer: of the one that would generate meanwhile.
    """

    wall: float
    processor: float
    trainer: float


@dataclass(frozen=True)
class Overhead:
    """What was measured; medians over the rounds.

    Args:
        bare: all rewards called on all samples in a loop.
        suite: the same from the first `submit` to the end of `collect`.
        num_rollouts: of a round.
    """

    bare: Seconds
    suite: Seconds
    num_rollouts: int

    @property
    def share(self) -> float:
        """Processor time of the suite over that of the bare calls, minus 1."""
        return self.suite.processor / self.bare.processor - 1

    @property
    def microseconds(self) -> float:
        """Processor time that a rollout costs more than the bare calls."""
        return (self.suite.processor - self.bare.processor) / self.num_rollouts * 1e6

    def row(self) -> str:
        """One line of a table."""
        bare = self.bare.processor / self.num_rollouts * 1e3
        trainer = self.suite.trainer / self.num_rollouts * 1e6
        wall = self.suite.wall / self.bare.wall - 1
        return (
            f"rewards of {bare:6.3f} ms a rollout: overhead {self.share:8.1%} "
            f"({self.microseconds:4.0f} us a rollout, {trainer:4.0f} us of them in the trainer); "
            f"by the clock {wall:8.1%}"
        )


class _Clock:
    """Time of this process and its children from here on."""

    def __init__(self):
        self._family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        self._began = self._read()

    def _read(self) -> list[float]:
        times = (process.cpu_times() for process in self._family[1:])
        others = sum(it.user + it.system for it in times)
        return [time.perf_counter(), time.process_time(), others]

    def seconds(self) -> Seconds:
        wall, own, others = (b - a for a, b in zip(self._began, self._read(), strict=True))
        return Seconds(wall, own + others, own)


def _median(measured: Sequence[Seconds]) -> Seconds:
    columns = zip(*((it.wall, it.processor, it.trainer) for it in measured), strict=True)
    return Seconds(*(statistics.median(column) for column in columns))


def measure(milliseconds: float, num_rollouts: int, num_rounds: int = 5) -> Overhead:
    """Measure one mix of rewards.

    Args:
        milliseconds: that the costly reward computes.
        num_rollouts: of a round.
        num_rounds: after one that is not counted.
    """
    computing = {"milliseconds": milliseconds}
    configs = [
        RewardConfig(name="format", type="gsm8k_format"),
        RewardConfig(name="integer", type="gsm8k_integer"),
        RewardConfig(name="computes", type=f"./{Path(__file__).name}:computes", args=computing),
    ]
    rollouts = _rollouts(num_rollouts)
    samples = [_sample(rollout) for rollout in rollouts]
    bare, whole = list[Seconds](), list[Seconds]()
    with RewardSuite(
        configs,
        group_size=GROUP_SIZE,
        config=RewardSuiteConfig(num_workers=1),
        base_dir=Path(__file__).resolve().parent,
    ) as suite:
        suite.submit(rollouts[0])  # the first one starts the processes
        suite.collect()
        for _ in range(num_rounds):
            clock = _Clock()
            for rollout in rollouts:
                suite.submit(rollout)
            assert suite.collect().valid.all()
            whole.append(clock.seconds())
            clock = _Clock()
            for sample in samples:
                for reward in suite.rewards:
                    reward.fn.function(sample, **reward.args)
            bare.append(clock.seconds())
    return Overhead(_median(bare), _median(whole), num_rollouts)


def suite_overhead() -> list[Overhead]:
    """Cheap rewards alone, then mixes as cheap and as dear as real ones."""
    return [measure(0.0, 2000), measure(1.0, 1000), measure(5.0, 400), measure(20.0, 100)]


def _rollouts(number: int) -> Sequence[Rollout]:
    prompt = Prompt(prompt_id="p", token_ids=(1,), text="How many? " * 20, answer="#### 18")
    completion = Completion(
        token_ids=(5,) * 400, logprobs=(0.0,) * 400, text=COMPLETION, finish_reason="stop"
    )
    return [
        Rollout(
            group_id=i // GROUP_SIZE,
            sample_id=i,
            prompt=prompt,
            completion=completion,
            policy_version=0,
        )
        for i in range(number)
    ]


def _sample(rollout: Rollout) -> RewardSample:
    return RewardSample(
        completion=rollout.completion.text,
        prompt=rollout.prompt.text,
        answer=rollout.prompt.answer,
        num_tokens=len(rollout.completion.token_ids),
    )


if __name__ == "__main__":
    for overhead in suite_overhead():
        print(overhead.row(), flush=True)
