"""Rows that name their rewards: the others are neither called nor missing, and numbers stay apart.

Two kinds of rows in one batch, as mixed data sets have them. Not covered: the run that trains on
such data, which tests/e2e has.
"""

from __future__ import annotations

import math

import pytest
import torch
from suite_helpers import mine, reward, rollout, suite

from gdpo_megatron.algorithms import compute_advantages
from gdpo_megatron.config.advantage import AdvantageConfig
from gdpo_megatron.config.reward import GateConfig
from gdpo_megatron.rewards.scores import RewardScores
from gdpo_megatron.types import RewardMatrix

NAMES = ("right", "number", "batch", "short")


def mixed() -> RewardScores:
    """Group 0 is judged by right and short, group 1 by number, group 2 by all.

    `number` raises on any text but numbers, and `batch` is invalid for all texts but "fine": called
    where they do not apply, both would leave their faults in the scores.
    """
    gold = "#### 18"
    with suite(
        reward("right", "gsm8k_correctness"),
        mine("number", "number"),
        mine("batch", "faulty_batch"),
        reward("short", "length", args={"limit": 2}, when=GateConfig(reward="right", gte=1.0)),
    ) as running:
        first = {"answer": gold, "metadata": {"rewards": ["short", "right"]}}
        second = {"metadata": {"rewards": ["number"]}}
        running.submit(rollout(0, "18", **first))
        running.submit(rollout(2, "4", **second))
        running.submit(rollout(1, "no number", num_tokens=3, **first))
        running.submit(rollout(3, "1", **second))
        running.submit(rollout(4, "fine", answer=gold, metadata={"rewards": None}))
        running.submit(rollout(5, "fine", answer=gold))
        return running.collect()


def test_other_rewards_do_not_apply_and_are_not_called():
    scores = mixed()
    assert scores.names == NAMES
    assert scores.not_applicable.tolist() == [
        [False, True, True, False],
        [False, True, True, False],
        [True, False, True, True],
        [True, False, True, True],
        [False, False, False, False],
        [False, False, False, False],
    ]
    assert scores.valid[:4].tolist() == (~scores.not_applicable[:4]).tolist()
    assert scores.values[:2, [0, 3]].tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert scores.values[2:4, 1].tolist() == [4.0, 1.0]
    assert scores.values[4:, [0, 2, 3]].tolist() == [[0.0, 0.25, 0.0], [0.0, 0.5, 0.0]]
    # The rows without names: `number` was called, and could not read them.
    assert scores.num_invalid == {
        "right": {},
        "number": {"raised ValueError": 2},
        "batch": {},
        "short": {},
    }
    assert scores.num_not_applicable == {"right": 2, "number": 2, "batch": 4, "short": 2}
    assert scores.reasons[2, "right"] == "not applicable"


def test_a_reward_that_does_not_apply_is_not_called():
    with suite(mine("number", "number"), mine("one", "one"), mine("batch", "faulty_batch")) as run:
        for sample_id in (0, 1):
            run.submit(rollout(sample_id, "no number", metadata={"rewards": ["one"]}))
        report = run.collect().report
    assert list(report.seconds) == ["one"]


def test_an_aborted_row_is_invalid_only_where_it_is_judged():
    with suite(reward("right", "gsm8k_correctness"), mine("one", "one")) as running:
        running.submit(rollout(0, finish_reason="abort", answer="1", metadata={"rewards": ["one"]}))
        scores = running.collect()
    assert scores.reasons == {(0, "right"): "not applicable", (0, "one"): "completion aborted"}


def test_advantages_are_as_if_each_kind_were_alone():
    """Group stage of GDPO, eps 0, by hand; weights right 1, number 2, short 3."""
    scores = mixed()
    config = AdvantageConfig(
        batch_norm="none",
        group_eps=0.0,
        weights={"right": 1.0, "number": 2.0, "batch": 1.0, "short": 3.0},
    )
    groups = torch.tensor([0, 0, 1, 1])
    matrix = RewardMatrix(NAMES, scores.values[:4], scores.valid[:4], groups)
    batch = compute_advantages(matrix, config)
    # Of two values a < b: mean (a+b)/2, unbiased std (b-a)/sqrt(2), so -1/sqrt(2) and 1/sqrt(2).
    half = 1 / math.sqrt(2)
    expected = torch.tensor(
        [[half, 0, 0, half], [-half, 0, 0, -half], [0, half, 0, 0], [0, -half, 0, 0]],
        dtype=torch.float64,
    )
    torch.testing.assert_close(batch.per_reward, expected, rtol=0, atol=1e-15)
    combined = torch.tensor([4 * half, -4 * half, 2 * half, -2 * half], dtype=torch.float64)
    torch.testing.assert_close(batch.combined, combined, rtol=0, atol=1e-15)
    assert batch.loss_rows.all()
    # Alone: only its rewards, only its rows.
    for rows, columns in ((slice(0, 2), [0, 3]), (slice(2, 4), [1])):
        names = tuple(NAMES[k] for k in columns)
        values = scores.values[rows][:, columns]
        alone = compute_advantages(
            RewardMatrix(names, values, torch.ones_like(values, dtype=torch.bool), groups[rows]),
            AdvantageConfig(
                batch_norm="none",
                group_eps=0.0,
                weights={name: config.weights[name] for name in names},  # pyright: ignore
            ),
        )
        torch.testing.assert_close(alone.combined, batch.combined[rows], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("names", "num_problems"), [(["right"], 0), (["right", "short"], 0), (["short"], 1)]
)
def test_a_condition_must_be_among_the_names(names: list[str], num_problems: int):
    rewards = suite(
        reward("right", "gsm8k_correctness"),
        reward("short", "length", args={"limit": 2}, when=GateConfig(reward="right", gte=1.0)),
    )
    problems = rewards.metadata_problems({"rewards": names})
    assert problems == num_problems * [
        "field 'rewards' names 'short' without 'right', its condition: it would never apply; add "
        "that or leave both out"
    ]


def test_answers_are_checked_by_the_rows_own_rewards():
    rewards = suite(reward("tool", "tool_call_correctness"), reward("right", "gsm8k_correctness"))
    gold = "<tool_call>\n{\n</tool_call>"
    assert rewards.answer_problems(gold, {"rewards": ["right"]}) == []
    (problem,) = rewards.answer_problems(gold, {"rewards": ["tool"]})
    assert problem.startswith("reward 'tool': ")
    assert len(rewards.answer_problems("", {})) == 2
