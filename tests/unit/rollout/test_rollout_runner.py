"""A step's rollouts over one engine: numbering, noise keys, rewards, and what is refused.

The engine is scripted, so that every number is known beforehand. Not covered: several engines, see
tests/distributed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from support.engines import ONE_RANK, ScriptedEngine, greedy

from gdpo_megatron.config.schema import RewardConfig, RolloutConfig
from gdpo_megatron.platform import detect_platform
from gdpo_megatron.rewards import NOT_APPLICABLE, REWARDS, RewardSample
from gdpo_megatron.rewards.suite import RewardSuite
from gdpo_megatron.rollout.base import FinishedCompletion, noise_key
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
def make_suite(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RewardSuite]]:
    """A suite of functions, registered for the time of the test."""
    monkeypatch.setattr(REWARDS, "_entries", dict(REWARDS._entries))
    suites: list[RewardSuite] = []

    def make(*functions: Callable[[RewardSample], object]) -> RewardSuite:
        for function in functions:
            REWARDS.add(function.__name__, function)
        configs = [RewardConfig(name=f.__name__, type=f.__name__) for f in functions]
        suites.append(RewardSuite(configs, group_size=G, num_workers=2))
        return suites[-1]

    yield make
    for suite in suites:
        suite.close()


def tokens(sample: RewardSample) -> float:
    return float(sample.num_tokens)


def only_with_answer(sample: RewardSample) -> object:
    return NOT_APPLICABLE if sample.answer is None else float(sample.answer == "yes")


def raises_for_c(sample: RewardSample) -> float:
    if sample.prompt == "C":
        raise KeyError("no such thing")
    return 2.0


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
    batch = run(engine, make_suite(tokens, only_with_answer, raises_for_c))
    assert list(batch.rollouts) != sorted(batch.rollouts), "the script finishes them out of order"
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
    suite = make_suite(tokens)
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
    alone: None, engine: ScriptedEngine, make_suite: Callable[..., RewardSuite]
):
    """The engine's last completions wait for the reward of the first."""
    scored, told = threading.Event(), list[tuple[int, int]]()
    waited: list[bool] = []

    def marks(sample: RewardSample) -> float:
        scored.set()
        return 1.0

    poll = engine.poll

    def slow_poll() -> list[FinishedCompletion]:
        if told:
            waited.append(scored.wait(timeout=30))
        return poll()

    engine.poll = slow_poll
    generated: list[int] = []
    run(
        engine,
        make_suite(marks),
        on_progress=lambda done, total: told.append((done, total)),
        on_generated=lambda: generated.append(len(told)),
    )
    assert waited and all(waited)
    assert told == [(n, 6) for n in range(1, 7)] and generated == [6]


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
    with pytest.raises(RuntimeError, match=message):
        run(engine, make_suite(tokens))


def test_null_stop_tokens_are_the_models_and_an_empty_list_is_none():
    for given, expected in ((None, (1, 2)), ((), ()), ((7,), (7,))):
        config = RolloutConfig(stop_token_ids=given, stop=("x",), top_k=3, temperature=0.5)
        sampling = sampling_params(config, (1, 2))
        assert sampling.stop_token_ids == expected
        assert (sampling.stop, sampling.top_k, sampling.temperature) == (("x",), 3, 0.5)
        assert sampling.max_completion_tokens == config.max_completion_tokens
