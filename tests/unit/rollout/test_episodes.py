"""Token-in, token-out over turns: what the engine drew is what is trained on, bit for bit.

A small random model draws tokens that no tokenizer would have chosen for the text that they spell,
so anything decoded and encoded again on the way would show. Not covered here: several engines and
ranks (tests/distributed), and a model that learns something (examples/calculator).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.engines import ONE_RANK, greedy, native_engine

from gdpo_megatron.config.environment import EnvironmentConfig
from gdpo_megatron.config.schema import RewardConfig
from gdpo_megatron.data.micro_batching import MicroBatching
from gdpo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from gdpo_megatron.environments.pool import EnvironmentPool
from gdpo_megatron.platform import detect_platform
from gdpo_megatron.rewards.suite import RewardSuite
from gdpo_megatron.rollout.base import FinishedCompletion, RolloutEngine, RolloutRequest
from gdpo_megatron.rollout.episodes import EnvironmentRuntime
from gdpo_megatron.rollout.long_tail import GroupRequest
from gdpo_megatron.rollout.runner import RolloutBatch, run_groups
from gdpo_megatron.types import Prompt, Rollout
from gdpo_megatron.update import plan_minibatches, rollout_micro_batches

HERE = Path(__file__).parent
G = 4
REWARDS = ("turns", "last_turn", "longest")


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """A process group of one, for the runner's collectives."""
    platform = detect_platform()
    platform.setup(0)
    dist.init_process_group(platform.backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def suite() -> Iterator[RewardSuite]:
    args = {
        "turns": {"name": "turn", "reduce": "max"},
        "last_turn": {"name": "length", "reduce": "last"},
        "longest": {"name": "length", "reduce": "max"},
    }
    rewards = [RewardConfig(name=name, type="environment", args=args[name]) for name in REWARDS]
    with RewardSuite(rewards, group_size=G, base_dir=HERE) as suite:
        yield suite


class Recording:
    """Around an engine: what it was asked, and what it drew."""

    def __init__(self, engine: RolloutEngine):
        self._engine = engine
        self.asked: dict[int, list[RolloutRequest]] = {}
        self.drawn: dict[int, list[tuple[tuple[int, ...], tuple[float, ...]]]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, requests: Sequence[RolloutRequest], sampling: Any) -> None:
        for request in requests:
            self.asked.setdefault(request.request_id, []).append(request)
        self._engine.submit(requests, sampling)

    def poll(self) -> list[FinishedCompletion]:
        finished = self._engine.poll()
        for it in finished:
            n, completion = self.asked[it.request_id][-1].num_carried, it.completion
            drawn = completion.token_ids[n:], completion.logprobs[n:]
            self.drawn.setdefault(it.request_id, []).append(drawn)
        return finished


def run(
    engine: Any,
    tokenizer: Tokenizer,
    suite: RewardSuite,
    *,
    num_groups: int,
    max_completion_tokens: int,
    factory: str = "Echo",
    stop_token_ids: Iterable[int],
    **environment: Any,
) -> RolloutBatch:
    config = EnvironmentConfig(type=f"./episode_environments.py:{factory}", **environment)
    device = torch.device("cpu")
    with EnvironmentPool(config, base_dir=HERE) as pool:
        prompts = [tuple(tokenizer.encode(f"Prompt {number}.")) for number in range(num_groups)]
        return run_groups(
            [
                GroupRequest(
                    prompt=Prompt(prompt_id=str(g), token_ids=ids, text=f"p{g}", answer=f"a{g}"),
                    noise_step=0,
                    noise_group=g,
                )
                for g, ids in enumerate(prompts)
            ],
            group_size=G,
            sampling=greedy(
                max_completion_tokens, temperature=2.0, stop_token_ids=tuple(stop_token_ids)
            ),
            engine=engine,
            engines=ONE_RANK,
            suite=suite,
            platform=detect_platform(),
            seed=5,
            stream="train",
            environment=EnvironmentRuntime(config, pool, tokenizer, ONE_RANK, device),
        )


def trained_tokens(batch: RolloutBatch, prompts: list[Prompt]) -> dict[int, tuple[Any, Any, Any]]:
    """Sample -> (labels, rollout log-probs) under the loss mask, and all labels, of the update."""
    lengths = batch.lengths.tolist()
    (plan,) = plan_minibatches(
        torch.ones(len(lengths), dtype=torch.bool),
        [len(prompt.token_ids) for prompt in prompts],
        lengths,
        num_loss_tokens=batch.num_loss_tokens.tolist(),
        group_size=G,
        num_minibatches=1,
        dp_size=1,
        hidden_size=64,
    )
    assert plan.num_loss_tokens == sum(r.num_tokens for r in batch.rollouts.values())
    micro_batches = rollout_micro_batches(
        plan,
        {
            s: (r.completion.token_ids, r.completion.logprobs, r.loss_mask())
            for s, r in batch.rollouts.items()
        },
        prompts,
        torch.zeros(len(lengths)),
        group_size=G,
        batching=MicroBatching(micro_batch_size=8),
        dp_rank=0,
    )
    found: dict[int, tuple[Any, Any, Any]] = {}
    for micro_batch in micro_batches:
        for slot, row in enumerate(micro_batch.row_ids.tolist()):
            mask = micro_batch.loss_mask[slot]
            found[plan.samples[0][row]] = (
                micro_batch.labels[slot, mask].tolist(),
                micro_batch.rollout_logprobs[slot, mask],
                micro_batch.labels[slot, : micro_batch.lengths[slot]].tolist(),
            )
    return found


@pytest.mark.parametrize(
    ("folder_name", "role", "num_groups", "max_completion_tokens"),
    [("stories_folder", None, 15, 240), ("chat_model_folder", "tool", 22, 480)],
    ids=["SentencePiece, plain text", "byte-level, chat template"],
)
def test_a_thousand_turns_keep_their_tokens(
    alone: None,
    suite: RewardSuite,
    request: pytest.FixtureRequest,
    folder_name: str,
    role: str | None,
    num_groups: int,
    max_completion_tokens: int,
):
    folder: Path = request.getfixturevalue(folder_name)
    tokenizer = load_tokenizer(folder)
    engine = Recording(native_engine(folder, max_sequence_length=512, version=3))
    stops = range(0, tokenizer.vocab_size, 4)
    batch = run(
        engine,
        tokenizer,
        suite,
        num_groups=num_groups,
        max_completion_tokens=max_completion_tokens,
        stop_token_ids=stops,
        max_turns=100,
        observation_role=role,
    )
    prompts = [batch.rollouts[g * G].prompt for g in range(num_groups)]
    trained = trained_tokens(batch, prompts)
    num_turns = num_awkward = 0
    for sample, rollout in batch.rollouts.items():
        # What the engine was asked: each time exactly what there was, and the answer's tokens.
        so_far: tuple[int, ...] = ()
        for turn, request_, (drawn, _) in zip(
            rollout.turns, engine.asked[sample], engine.drawn[sample], strict=True
        ):
            assert request_.input_token_ids[: len(prompts[sample // G].token_ids)] == (
                prompts[sample // G].token_ids
            )
            carried = () if request_.carried is None else request_.carried.token_ids
            assert carried[: len(so_far)] == so_far
            if turn.start:
                before = rollout.turns[rollout.turns.index(turn) - 1]
                text = tokenizer.decode(carried[len(so_far) :], skip_special_tokens=False)
                assert before.observation.strip() in text
            assert (len(carried), len(carried) + len(drawn)) == (turn.start, turn.end)
            assert turn.text == tokenizer.decode(drawn)
            so_far = carried + drawn
            num_turns += 1
            num_awkward += list(drawn) != tokenizer.encode(turn.text, add_special_tokens=False)
        assert rollout.completion.token_ids == so_far
        assert len(rollout.loss_mask()) == len(so_far)
        # What is trained on: the tokens that were drawn, and their log-probs, in order.
        labels, logprobs, row = trained[sample]
        assert labels == [token for drawn, _ in engine.drawn[sample] for token in drawn]
        drawn_logprobs = [x for _, logprobs in engine.drawn[sample] for x in logprobs]
        assert torch.equal(logprobs, torch.tensor(drawn_logprobs))
        assert row == [*prompts[sample // G].token_ids, *so_far][1:]
    assert num_turns >= 1000 and num_awkward >= 500, (num_turns, num_awkward)
    assert batch.num_turns.sum() == num_turns
    report = batch.environment
    assert report.num_faults == 0 and report.num_tokens == sum(
        len(r.completion.token_ids) - r.num_tokens for r in batch.rollouts.values()
    )


@pytest.fixture
def engine(chat_model_folder: Path) -> RolloutEngine:
    return native_engine(chat_model_folder, max_sequence_length=512, version=3)


def small_run(engine: Any, folder: Path, suite: RewardSuite, **options: Any) -> list[Rollout]:
    defaults = {"num_groups": 2, "max_completion_tokens": 300, "stop_token_ids": range(0, 300, 4)}
    batch = run(engine, load_tokenizer(folder), suite, **(defaults | options))
    return [rollout for _, rollout in sorted(batch.rollouts.items())]


def test_an_environment_ends_an_episode_and_its_rewards_are_the_runs(
    alone: None, engine: Any, chat_model_folder: Path, suite: RewardSuite
):
    batch = run(
        engine,
        load_tokenizer(chat_model_folder),
        suite,
        num_groups=2,
        max_completion_tokens=400,
        stop_token_ids=range(0, 300, 4),
        args={"num_turns": 3},
    )
    for row, (_, rollout) in enumerate(sorted(batch.rollouts.items())):
        assert len(rollout.turns) == 3 and rollout.completion.finish_reason == "stop"
        assert rollout.turns[-1].observation == "" and rollout.turns[0].observation
        assert rollout.turns[-1].end == len(rollout.completion.token_ids)
        texts = [turn.text for turn in rollout.turns]
        assert rollout.completion.text == "\n".join(texts)
        values = dict(zip(batch.rewards.names, batch.rewards.values[row].tolist(), strict=True))
        lengths = [float(len(text)) for text in texts]
        assert values == {"turns": 3.0, "last_turn": lengths[-1], "longest": max(lengths)}
        assert rollout.policy_versions == ((0, 3),)
    assert batch.num_turns.tolist() == [3] * 8
    assert batch.environment.num_calls == 24 and batch.environment.num_cut == 0


def test_turns_and_tokens_have_limits(
    alone: None, engine: Any, chat_model_folder: Path, suite: RewardSuite
):
    few = small_run(engine, chat_model_folder, suite, max_turns=2)
    assert [len(rollout.turns) for rollout in few] == [2] * 8
    assert all(rollout.completion.finish_reason == "stop" for rollout in few)
    short = small_run(engine, chat_model_folder, suite, max_completion_tokens=60, max_turns=100)
    for rollout, other in zip(short, few, strict=True):
        # It ends with the model's words: an observation that leaves it no token is left out.
        assert rollout.completion.finish_reason == "length"
        assert rollout.turns[-1].end == len(rollout.completion.token_ids) <= 60
        assert rollout.loss_mask()[-1]
        # The noise is the completion's: limits do not change what comes before them.
        both = min(rollout.turns[0].end, other.turns[0].end)
        assert rollout.completion.token_ids[:both] == other.completion.token_ids[:both]
    assert any(len(rollout.turns) > 1 for rollout in short)


def test_a_fault_leaves_the_row_without_rewards(
    alone: None, engine: Any, chat_model_folder: Path, suite: RewardSuite
):
    batch = run(
        engine,
        load_tokenizer(chat_model_folder),
        suite,
        num_groups=2,
        max_completion_tokens=300,
        stop_token_ids=range(0, 300, 4),
        factory="FailsForSome",
        max_turns=2,
    )
    faulty = [s for s, rollout in batch.rollouts.items() if rollout.fault]
    assert 0 < len(faulty) < 8 and batch.environment.num_faults == len(faulty)
    assert "ValueError: an odd turn" in batch.environment.traceback
    for sample in range(8):
        valid = batch.rewards.valid[sample].tolist()
        assert valid == [sample not in faulty] * 3, sample
    why = batch.reasons[faulty[0], "turns"]
    assert why.startswith("environment fault: environment raised: ValueError")
