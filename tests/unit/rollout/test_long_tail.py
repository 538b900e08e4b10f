"""Which groups a step uses, drops and carries, and that nothing is lost between steps.

The cut is checked on its own, by hand-made orders of finishing, then through the runner with the
native engine on a small model, whose completions are the same whether or not they were broken off.
Not covered: several engines, and a run that is resumed (tests/e2e).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from support.engines import ONE_RANK, folder_tensors, greedy, native_engine

from gdpo_megatron.config.long_tail import LongTailConfig
from gdpo_megatron.config.schema import RewardConfig
from gdpo_megatron.data.sampler import PromptSampler
from gdpo_megatron.platform import detect_platform
from gdpo_megatron.rewards.suite import RewardSuite
from gdpo_megatron.rollout.base import noise_key
from gdpo_megatron.rollout.generation import Noise
from gdpo_megatron.rollout.long_tail import (
    CarriedCompletion,
    GroupRequest,
    LongTail,
    TailCut,
    deal_groups,
    long_tail_problems,
)
from gdpo_megatron.rollout.native import NativeEngine
from gdpo_megatron.rollout.runner import RolloutBatch, run_groups
from gdpo_megatron.types import Completion, Prompt

G = 4


def prompt(number: int) -> Prompt:
    return Prompt(prompt_id=str(number), token_ids=(number + 3, 7), text=f"p{number}")


def asked(number: int, **fields: Any) -> GroupRequest:
    return GroupRequest(prompt=prompt(number), noise_step=0, noise_group=number, **fields)


def cut(
    num_groups: int, wanted: int, replica: int = 0, num_replicas: int = 1, **config: Any
) -> TailCut:
    groups = [asked(g) for g in range(num_groups)]
    return TailCut(
        LongTailConfig(**config),
        groups,
        deal_groups(groups, num_replicas),
        replica=replica,
        num_replicas=num_replicas,
        group_size=G,
        num_wanted=wanted,
    )


def finish(tail: TailCut, *groups: int) -> bool:
    for group in groups:
        tail.finished(group)
    return tail.is_enough()


# ---- the cut -------------------------------------------------------------------------------------


def test_by_default_everything_is_waited_for():
    tail = cut(3, 3)
    assert not finish(tail, *[0, 1, 2] * 3, 0, 2)
    assert finish(tail, 1)
    assert tail.kept() == [0, 1, 2]


def test_over_provisioning_keeps_the_groups_that_are_complete_first():
    tail = cut(5, 3, over_provision=0.5)
    assert not finish(tail, 4, 4, 4, 4, 1, 1, 1, 1, 0, 0, 0, 2, 2, 3, 3, 3)
    assert finish(tail, 3)
    assert tail.kept() == [1, 3, 4]
    # Of groups that are complete at once, the lower number.
    tail = cut(4, 2, over_provision=1)
    assert finish(tail, *[3, 2, 1] * 4)
    assert tail.kept() == [1, 2]


def test_the_abort_budget_counts_completions_of_the_groups_that_are_kept():
    tail = cut(3, 3, max_aborted_fraction=0.25)  # 3 of 12
    assert not finish(tail, *[0] * 4, 1, 1, 1, 2)
    assert finish(tail, 2)
    assert tail.kept() == [0, 1, 2]
    # With more groups than wanted, only those that lack the fewest count.
    tail = cut(3, 2, over_provision=0.5, max_aborted_fraction=0.25)  # 2 of 8
    assert not finish(tail, 2, 2, 2, 0)
    assert finish(tail, 0, 0)
    assert tail.kept() == [0, 2]


def test_with_carrying_whole_groups_are_kept_and_counted():
    config = {"max_aborted_fraction": 0.25, "max_carried_steps": 1}
    tail = cut(4, 4, **config)  # one group of four
    assert not finish(tail, *[0, 1, 2, 3] * 3, 3, 0)
    assert finish(tail, 1)
    assert tail.kept() == [0, 1, 3]


def test_a_group_that_was_carried_long_enough_is_waited_for():
    groups = [asked(g, steps_carried=g) for g in range(4)]
    tail = TailCut(
        LongTailConfig(over_provision=1, max_carried_steps=3),
        groups,
        [0] * 4,
        replica=0,
        num_replicas=1,
        group_size=G,
        num_wanted=2,
    )
    assert not finish(tail, *[0, 1, 2] * 4, 3, 3, 3)
    assert finish(tail, 3)
    # It is used before those that were complete earlier.
    assert tail.kept() == [0, 3]


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
def test_shares_of_the_engines_add_up(num_replicas: int):
    """What is wanted and what may be missing is dealt to the engines, with nothing over."""
    kept, missing = 0, 0
    for replica in range(num_replicas):
        tail = cut(6, 5, replica, num_replicas, over_provision=0.2, max_aborted_fraction=0.25)
        own = [g for g in range(6) if g % num_replicas == replica]
        kept += len(tail.kept())
        order = [g for g in own for _ in range(G)]
        while order and not tail.is_enough():
            tail.finished(order.pop(0))
        missing += len([g for g in order if g in tail.kept()])
    assert kept == 5 and missing == 5  # a quarter of 20


def test_carried_groups_stay_on_their_engine_and_new_ones_fill_up():
    groups = [asked(0, replica=1), asked(1, replica=1), *(asked(g) for g in range(2, 6))]
    assert deal_groups(groups, 2) == [1, 1, 0, 0, 0, 1]
    assert deal_groups([asked(g) for g in range(5)], 2) == [0, 1, 0, 1, 0]


# ---- groups from step to step --------------------------------------------------------------------


def long_tail(num_rows: int = 10, **config: Any) -> tuple[LongTail, PromptSampler]:
    sampler = PromptSampler(num_rows, 4, seed=0, shuffle=False)
    rows = [prompt(i) for i in range(num_rows)]
    return LongTail(LongTailConfig(**config), sampler, rows, num_replicas=2), sampler


def test_groups_are_asked_for_in_equal_number_of_each_engine():
    for over_provision, expected in ((0.0, 4), (0.01, 6), (0.5, 6), (0.75, 8), (1.0, 8)):
        tail, _ = long_tail(over_provision=over_provision)
        assert len(tail.ask(0, 4)) == expected


def part(num_tokens: int, reason: Any = "abort") -> CarriedCompletion:
    return CarriedCompletion(
        completion=Completion(
            token_ids=(1,) * num_tokens,
            logprobs=(-0.1,) * num_tokens,
            text="",
            finish_reason=reason,
        ),
        policy_versions=((0, 2), (1, 3)),
    )


def test_carried_groups_survive_a_checkpoint_to_the_bit():
    config = {"over_provision": 0.5, "max_carried_steps": 2}
    tail, sampler = long_tail(**config)
    groups = tail.ask(3, 4)
    parts = (part(3), None, part(4, "stop"), None)
    tail.carried = (
        GroupRequest(**{**_fields(groups[5]), "replica": 1, "steps_carried": 1, "parts": parts}),
        GroupRequest(**{**_fields(groups[4]), "replica": 0, "steps_carried": 2, "parts": parts}),
    )
    tail.carried = tuple(sorted(tail.carried, key=lambda g: g.noise_group))
    saved = [json.loads(json.dumps(tail.own_state(engines(replica)))) for replica in (0, 1)]
    assert [len(it) for it in saved] == [1, 1]
    assert tail.own_state(engines(1, tp_rank=1)) == []
    fresh, fresh_sampler = long_tail(**config)
    fresh_sampler.load_state_dict(sampler.state_dict())
    fresh.load_carried([*saved[1], *saved[0]], replica=1, group_size=4, max_completion_tokens=8)
    # Another engine's tokens stay there.
    assert fresh.carried[1] == tail.carried[1]
    assert fresh.carried[0] == GroupRequest(**{**_fields(tail.carried[0]), "parts": ()})
    assert [g.row for g in fresh.ask(4, 4)] == [4, 5, 6, 7, 8, 9]

    # What no longer fits is asked for anew: shorter completions, other groups, carrying off.
    for change, options in (
        ({}, {"max_completion_tokens": 3}),
        ({}, {"group_size": 3}),
        ({"max_carried_steps": 0}, {}),
    ):
        fresh, fresh_sampler = long_tail(**(config | change))
        fresh_sampler.load_state_dict(sampler.state_dict())
        arguments = {"replica": 1, "group_size": 4, "max_completion_tokens": 8} | options
        fresh.load_carried([*saved[0], *saved[1]], **arguments)
        assert fresh.carried == ()
        assert [g.row for g in fresh.ask(4, 4)] == [4, 5, 6, 7, 8, 9]


def _fields(group: GroupRequest) -> dict[str, Any]:
    return {name: getattr(group, name) for name in GroupRequest.__slots__}


def engines(replica: int, tp_rank: int = 0) -> Any:
    return replace(ONE_RANK, replica=replica, num_replicas=2, tp_rank=tp_rank)


@pytest.mark.parametrize(
    ("config", "others", "said"),
    [
        ({"max_aborted_fraction": 0.02}, {}, "0.02 of a step's 32 completions is less than one"),
        (
            {"max_aborted_fraction": 0.1, "max_carried_steps": 1},
            {},
            "0.1 of a step's 8 groups (whole ones count with max_carried_steps) is less than one",
        ),
        ({"over_provision": 0.5}, {"num_replicas": 9}, "9 engines have less than a group each"),
        ({"over_provision": 0.5}, {"dynamic_filter": "advantage"}, "over_provision is 0.5, but"),
        (
            {"max_aborted_fraction": 0.5, "max_carried_steps": 2},
            {"dynamic_filter": "advantage"},
            "max_carried_steps is 2, but dynamic_sampling.filter is advantage",
        ),
    ],
)
def test_what_does_not_combine_is_refused(
    config: dict[str, Any], others: dict[str, Any], said: str
):
    arguments = {
        "num_prompts": 8,
        "group_size": 4,
        "num_replicas": 2,
        "dynamic_filter": "none",
    }
    (problem,) = long_tail_problems(LongTailConfig(**config), **(arguments | others))
    assert said in problem
    fine = LongTailConfig(over_provision=0.25, max_aborted_fraction=0.25, max_carried_steps=3)
    assert long_tail_problems(fine, **arguments) == []


def test_carrying_without_a_cut_is_refused():
    with pytest.raises(ValueError, match="nothing is ever carried"):
        LongTailConfig(max_carried_steps=1)


# ---- with an engine ------------------------------------------------------------------------------


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
    rewards = [
        RewardConfig(name=name, type=f"./runner_rewards.py:{name}")
        for name in ("tokens", "sees_whole_groups")
    ]
    with RewardSuite(rewards, group_size=G, base_dir=Path(__file__).parent) as suite:
        yield suite


@pytest.fixture
def engine(model_folder: Callable[[str], Path]) -> NativeEngine:
    return native_engine(model_folder("gqa"), version=3)


STOP = tuple(range(0, 300, 12))  # a twelfth of the vocabulary: lengths differ widely
SAMPLING = greedy(40, temperature=1.0, stop_token_ids=STOP)


def rollouts(
    groups: Sequence[GroupRequest], engine: NativeEngine, suite: RewardSuite, **options: Any
) -> RolloutBatch:
    arguments: dict[str, Any] = {
        "group_size": G,
        "sampling": SAMPLING,
        "engine": engine,
        "engines": ONE_RANK,
        "suite": suite,
        "platform": detect_platform(),
        "seed": 5,
        "stream": "train",
    }
    return run_groups(groups, **(arguments | options))


def tokens_of(batch: RolloutBatch) -> dict[str, list[tuple[int, ...]]]:
    """Prompt id -> the tokens of its completions."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for _, rollout in sorted(batch.rollouts.items()):
        found.setdefault(rollout.prompt.prompt_id, []).append(rollout.completion.token_ids)
    return found


def test_the_first_complete_groups_are_used_and_numbered_without_gaps(
    alone: None, engine: NativeEngine, suite: RewardSuite
):
    groups = [asked(g) for g in range(6)]
    whole = rollouts(groups, engine, suite)
    assert whole.cut.kept == tuple(range(6)) and not whole.cut.returned
    longest = {p: max(map(len, tokens)) for p, tokens in tokens_of(whole).items()}

    config = LongTailConfig(over_provision=0.5)
    batch = rollouts(groups, engine, suite, num_wanted=4, long_tail=config)
    kept = [str(g) for g in batch.cut.kept]
    assert len(kept) == 4 and sorted([*batch.cut.kept, *batch.cut.returned]) == list(range(6))
    assert kept != ["0", "1", "2", "3"], "this case shows nothing of the numbers"
    # The short ones are preferred: that is the bias which the docs tell of.
    assert max(longest[p] for p in kept) <= min(longest[str(g)] for g in batch.cut.returned)
    assert tokens_of(batch) == {p: tokens_of(whole)[p] for p in kept}
    assert sorted(batch.rollouts) == list(range(4 * G))
    assert batch.rewards.group_ids.tolist() == [g for g in range(4) for _ in range(G)]
    assert all(r.group_id == s // G and r.sample_id == s for s, r in batch.rollouts.items())
    assert batch.rewards.valid.all()
    assert batch.rewards.values[:, 0].tolist() == batch.lengths.tolist()
    assert batch.rewards.values[:, 1].tolist() == [float(G)] * 4 * G
    assert batch.report.num_invalid == {"tokens": {}, "sees_whole_groups": {}}
    counts = batch.cut.counts
    assert counts["num_groups_asked"] == 6 and counts["num_groups_returned"] == 2
    dropped = counts["num_tokens_dropped"]
    assert counts["num_aborted"] >= 1 and dropped > 0
    assert counts["num_generated_tokens"] == int(batch.lengths.sum()) + dropped
    assert batch.num_generated_tokens < whole.num_generated_tokens
    assert engine.num_unfinished == 0


def test_the_abort_budget_leaves_rows_out(alone: None, engine: NativeEngine, suite: RewardSuite):
    groups = [asked(g) for g in range(6)]
    whole = tokens_of(rollouts(groups, engine, suite))
    config = LongTailConfig(max_aborted_fraction=0.125)
    batch = rollouts(groups, engine, suite, long_tail=config)
    aborted = batch.finish == 2
    assert aborted.sum() == 3 == batch.cut.counts["num_aborted"]
    assert not batch.rewards.valid[aborted].any() and batch.rewards.valid[~aborted].all()
    assert batch.finish_share("abort") == 0.125
    assert batch.report.num_invalid["tokens"] == {"completion aborted": 3}
    batch.check_invalid(0.0)  # nothing is wrong with the rewards
    for p, completions in tokens_of(batch).items():
        for mine, all_of_it in zip(completions, whole[p], strict=True):
            assert mine == all_of_it[: len(mine)]


def test_carried_completions_are_those_that_were_never_broken_off(
    alone: None, engine: NativeEngine, suite: RewardSuite, model_folder: Callable[[str], Path]
):
    """Same weights under another version: every token, position of the noise included, is right."""
    groups = [asked(g) for g in range(6)]
    whole = rollouts(groups, engine, suite)
    config = LongTailConfig(over_provision=1.0, max_carried_steps=2)
    first = rollouts(groups, engine, suite, num_wanted=3, long_tail=config)
    assert len(first.cut.kept) == 3 and not first.cut.returned
    carried = first.cut.carried
    assert [g.steps_carried for g in carried] == [1, 1, 1]
    assert any(p is not None and not p.is_finished for g in carried for p in g.parts)

    engine.load_weights(folder_tensors(model_folder("gqa")).items(), 4)
    second = rollouts(carried, engine, suite)
    assert tokens_of(first) | tokens_of(second) == tokens_of(whole)
    logprobs = {r.completion.token_ids: r.completion.logprobs for r in whole.rollouts.values()}
    texts = {r.completion.token_ids: r.completion.text for r in whole.rollouts.values()}
    seen: set[int] = set()
    for rollout in second.rollouts.values():
        completion = rollout.completion
        assert completion.logprobs == pytest.approx(logprobs[completion.token_ids], abs=1e-5)
        assert completion.text == texts[completion.token_ids]
        old = carried[rollout.group_id].parts[rollout.sample_id % G]
        n = 0 if old is None else len(old.completion.token_ids)
        if old is None:
            expected = ((0, 4),)
        else:
            expected = ((0, 3),) if old.is_finished else ((0, 3), (n, 4))
            assert completion.logprobs[:n] == old.completion.logprobs
        assert rollout.policy_versions == expected
        assert rollout.policy_version == expected[-1][1]
        seen.add(len(expected))
    assert seen == {1, 2}
    counts = second.cut.counts
    assert counts["num_groups_resumed"] == 3 and counts["max_version_lag"] == 1
    assert counts["num_tokens_resumed"] == sum(
        len(p.completion.token_ids) for g in carried for p in g.parts if p is not None
    )
    made = first.num_generated_tokens + second.num_generated_tokens
    assert made == whole.num_generated_tokens and counts["num_tokens_dropped"] == 0


def test_the_noise_is_that_of_the_step_which_asked_first():
    group = GroupRequest(prompt=prompt(0), noise_step=7, noise_group=3, steps_carried=2)
    assert Noise(5, "train").key(group, 1) == noise_key(5, "train", 7, 3, 1)
