"""A step's rollouts over one engine: numbering, noise keys, rewards, and what is refused.

The engine is scripted, so that every number is known beforehand. Not covered: several engines, see
tests/distributed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.engines import ONE_RANK, ScriptedEngine, greedy

from gdpo_megatron.config.schema import RewardConfig, RolloutConfig
from gdpo_megatron.platform import detect_platform
from gdpo_megatron.rewards.breaker import TooManyInvalid
from gdpo_megatron.rewards.suite import RewardSuite
from gdpo_megatron.rollout.base import FinishedCompletion, noise_key
from gdpo_megatron.rollout.failure import EngineFailure
from gdpo_megatron.rollout.runner import RolloutBatch, run_rollouts, sampling_params
from gdpo_megatron.types import Prompt

PROMPTS = [
    Prompt(prompt_id="a", token_ids=(1, 2), text="A", answer="yes"),
    Prompt(prompt_id="b", token_ids=(3,), text="B"),
    Prompt(prompt_id="c", token_ids=(4, 5, 6), text="C", answer="no"),
]
ANSWERS = {(1, 2): (7, 8), (3,): (9,) * 5, (4, 5, 6): (10, 11, 12)}
G = 2


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """A process group of one, for the runner's collectives."""
    platform = detect_platform()
    platform.setup(0)
    dist.init_process_group(platform.backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def engine() -> ScriptedEngine:
    engine = ScriptedEngine(ANSWERS, {}, max_sequence_length=16)
    engine.load_weights([], 5)
    return engine


@pytest.fixture
def make_suite() -> Iterator[Callable[..., RewardSuite]]:
    """A suite of functions of runner_rewards.py, by name and with their arguments."""
    suites: list[RewardSuite] = []

    def make(*names: str, **args: object) -> RewardSuite:
        configs = [
            RewardConfig(name=name, type=f"./runner_rewards.py:{name}", args=args) for name in names
        ]
        suites.append(RewardSuite(configs, group_size=G, base_dir=Path(__file__).parent))
        return suites[-1]

    yield make
    for suite in suites:
        suite.close()


def run(engine: ScriptedEngine, suite: RewardSuite, **options: object) -> RolloutBatch:
    arguments: dict = {
        "group_size": G,
        "sampling": greedy(4, stop_token_ids=()),
        "engine": engine,
        "engines": ONE_RANK,
        "suite": suite,
        "platform": detect_platform(),
        "seed": 11,
        "stream": "train",
        "step": 3,
    }
    return run_rollouts(PROMPTS, **(arguments | options))


def test_samples_are_numbered_by_group_and_gathered_by_number(
    alone: None, engine: ScriptedEngine, make_suite: Callable[..., RewardSuite]
):
    order: list[int] = []
    poll = engine.poll

    def noted() -> list[FinishedCompletion]:
        finished = poll()
        order.extend(it.request_id for it in finished)
        return finished

    engine.poll = noted
    batch = run(engine, make_suite("tokens", "only_with_answer", "raises_for_c"))
    assert order != sorted(order), "this case shows nothing"
    for sample, rollout in batch.rollouts.items():
        assert rollout.sample_id == sample and rollout.group_id == sample // G
        assert rollout.prompt is PROMPTS[sample // G] and rollout.policy_version == 5
        assert rollout.completion.token_ids == ANSWERS[rollout.prompt.token_ids][:4]
    assert batch.lengths.tolist() == [2, 2, 4, 4, 3, 3]
    assert batch.finish_share("stop") == pytest.approx(4 / 6)
    assert batch.finish_share("length") == pytest.approx(2 / 6)
    rewards = batch.rewards
    assert rewards.names == ("tokens", "only_with_answer", "raises_for_c")
    assert rewards.group_ids.tolist() == [0, 0, 1, 1, 2, 2]
    assert (
        rewards.valid.tolist()
        == [[True] * 3] * 2 + [[True, False, True]] * 2 + [[True, True, False]] * 2
    )
    assert rewards.values[:, 0].tolist() == [2, 2, 4, 4, 3, 3]
    assert rewards.values[rewards.valid[:, 1], 1].tolist() == [1, 1, 0, 0]
    assert rewards.values[rewards.valid[:, 2], 2].tolist() == [2, 2, 2, 2]
    assert batch.not_applicable.tolist() == [
        [False, sample in (2, 3), False] for sample in range(6)
    ]
    assert torch.isnan(batch.raw).equal(~rewards.valid)
    assert {key for key in batch.reasons if key[1] == "raises_for_c"} == {
        (4, "raises_for_c"),
        (5, "raises_for_c"),
    }
    assert "KeyError" in batch.reasons[4, "raises_for_c"]
    assert batch.replica_of == [0] * 6


def test_noise_keys_name_the_completion(
    alone: None, engine: ScriptedEngine, make_suite: Callable[..., RewardSuite]
):
    suite = make_suite("tokens")
    run(engine, suite)
    assert [r.noise_key for r in engine.requests] == [
        noise_key(11, "train", 3, prompt, sample) for prompt in range(3) for sample in range(G)
    ]
    seen = {r.noise_key for r in engine.requests}
    for change in ({"seed": 12}, {"stream": "eval"}, {"step": 4}):
        engine.requests.clear()
        run(engine, suite, **change)
        assert not seen & {r.noise_key for r in engine.requests}


def test_rewards_start_while_generation_goes_on(
    alone: None, engine: ScriptedEngine, make_suite: Callable[..., RewardSuite], tmp_path: Path
):
    """The engine's last completions wait for the reward of the first."""
    scored, told = tmp_path / "scored", list[tuple[int, int]]()
    waited: list[bool] = []
    poll = engine.poll

    def slow_poll() -> list[FinishedCompletion]:
        if told:
            end = time.monotonic() + 120
            while not scored.exists() and time.monotonic() < end:
                time.sleep(0.01)
            waited.append(scored.exists())
        return poll()

    engine.poll = slow_poll
    generated: list[int] = []
    batch = run(
        engine,
        make_suite("marks", path=str(scored)),
        on_progress=lambda done, total: told.append((done, total)),
        on_generated=lambda: generated.append(len(told)),
    )
    assert waited and all(waited)
    assert told == [(n, 6) for n in range(1, 7)] and generated == [6]
    assert batch.report.wait_seconds > 0 and batch.report.seconds["marks"] > 0


def test_faults_are_reported_and_a_broken_reward_is_told(
    alone: None, engine: ScriptedEngine, make_suite: Callable[..., RewardSuite]
):
    batch = run(engine, make_suite("tokens", "raises_for_c"))
    assert batch.report.num_invalid == {"tokens": {}, "raises_for_c": {"raised KeyError": 2}}
    batch.check_invalid(0.25)  # 2 of 6, which count as 8
    with pytest.raises(TooManyInvalid) as error:
        batch.check_invalid(0.24)
    first, trace = error.value.problems
    assert first == (
        "reward 'raises_for_c': 2 of 6 rows are invalid, more than "
        "reward_suite.max_invalid_fraction 0.24 allows: raised KeyError (2)"
    )
    assert trace.startswith("reward 'raises_for_c', first traceback:\n")
    assert "no such thing" in trace


@pytest.mark.parametrize("fault", ["version", "nan", "inf"])
def test_completions_that_the_update_cannot_use_end_the_step(
    alone: None, engine: ScriptedEngine, make_suite: Callable[..., RewardSuite], fault: str
):
    poll = engine.poll

    def bad_poll() -> list[FinishedCompletion]:
        finished = poll()
        last = finished[-1]
        if fault == "version":
            return [*finished[:-1], replace(last, policy_version=4)]
        logprobs = (*last.completion.logprobs[:-1], float(fault))
        return [
            *finished[:-1],
            replace(last, completion=replace(last.completion, logprobs=logprobs)),
        ]

    engine.poll = bad_poll
    message = "policy version 4, not 5" if fault == "version" else "log-probs that are not finite"
    with pytest.raises(EngineFailure, match=message):
        run(engine, make_suite("tokens"))


def test_null_stop_tokens_are_the_models_and_an_empty_list_is_none():
    for given, expected in ((None, (1, 2)), ((), ()), ((7,), (7,))):
        config = RolloutConfig(stop_token_ids=given, stop=("x",), top_k=3, temperature=0.5)
        sampling = sampling_params(config, (1, 2))
        assert sampling.stop_token_ids == expected
        assert (sampling.stop, sampling.top_k, sampling.temperature) == (("x",), 3, 0.5)
        assert sampling.max_completion_tokens == config.max_completion_tokens
