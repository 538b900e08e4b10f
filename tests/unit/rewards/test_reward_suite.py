"""The suite in numbers: forms, conditions, faults, and that the number of workers does not show.

What ends a worker is in test_reward_pool.py.
"""

from __future__ import annotations

import datetime
import math
import random
from pathlib import Path

import pytest
import torch
from suite_helpers import assert_same, mine, reward, rollout, score, suite, wait_until
from suite_rewards import BATCH_RESULTS, FAULTS

from gdpo_megatron.config.reward import GateConfig
from gdpo_megatron.rewards import RewardSample
from gdpo_megatron.rewards.scores import RewardScores
from gdpo_megatron.rewards.suite import RewardSuite
from gdpo_megatron.types import Rollout


def test_rows_are_ordered_by_sample_id_and_columns_by_config():
    gold = "#### 18"
    with suite(
        reward("integer", "gsm8k_integer", weight=0.5),
        reward("right", "gsm8k_correctness"),
        reward("short", "length", args={"limit": 2}, weight=2.0),
    ) as running:
        assert running.names == ("integer", "right", "short")
        assert running.weights == {"integer": 0.5, "right": 1.0, "short": 2.0}
        running.submit(rollout(2, "18", answer=gold, num_tokens=3))
        running.submit(rollout(0, "x", answer=gold))
        running.submit(rollout(3, "19", answer=gold, finish_reason="length"))
        scores = running.collect()
    assert scores.names == ("integer", "right", "short")
    assert scores.sample_ids.tolist() == [0, 2, 3] and scores.sample_ids.dtype == torch.int64
    assert scores.values.tolist() == [[0.0, 0.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    assert scores.values.dtype == scores.raw.dtype == torch.float64
    assert torch.equal(scores.raw, scores.values)
    assert scores.valid.all() and not scores.not_applicable.any()
    assert scores.reasons == {} and scores.tracebacks == {}
    assert scores.num_invalid == {"integer": {}, "right": {}, "short": {}}
    report = scores.report
    assert (report.num_restarts, report.num_recycled, report.num_retries) == (0, 0, 0)
    assert report.num_invalid == scores.num_invalid and report.wait_seconds > 0
    assert all(seconds > 0 for seconds in report.seconds.values()) and len(report.seconds) == 3


def test_a_reward_sees_the_completion_alone_and_metadata_as_json_has_it():
    day = datetime.date(2024, 2, 29)
    metadata = {"k": 1, "list": [1.5, None, "\u2028"], "day": day}
    with suite(reward("look")) as running:
        assert running.metadata_problems(metadata) == []
        (problem,) = running.metadata_problems({"image": b"\x89PNG"})
        running.submit(
            rollout(0, "hi \ud800\n", prompt="P", answer="A", metadata=metadata, num_tokens=3)
        )
        scores = running.collect()
    assert problem == (
        "its fields go to rewards as JSON: a bytes cannot be given to a reward; "
        "leave that column out"
    )
    seen = RewardSample(
        completion="hi \ud800\n", prompt="P", answer="A", num_tokens=3, finish_reason="stop",
        metadata={**metadata, "day": "2024-02-29"},
    )  # fmt: skip
    assert scores.reasons[0, "look"] == f"seen: {seen!r}"


def test_collect_starts_afresh_and_may_be_empty():
    with suite(reward("one")) as running:
        assert running.collect().values.shape == (0, 1)
        for _ in range(2):  # the same ids are used in every step
            running.submit(rollout(0))
            assert running.collect().sample_ids.tolist() == [0]
        empty = running.collect()
    assert empty.values.shape == empty.valid.shape == empty.not_applicable.shape == (0, 1)


def test_numbers_that_are_scores():
    scores = score(reward("plain_scalars"), texts=[str(i) for i in range(7)], num_workers=1)
    assert scores.values[:, 0].tolist() == [1.0, 2.0, 0.5, 0.25, 3.0, 0.0, 1.5]
    assert scores.valid.all()


def test_every_bit_of_a_score_arrives():
    values = [0.1, 1 / 3, 5e-324, -0.0, 1.7976931348623157e308, 2**53 + 1]
    scores = score(reward("number"), texts=[repr(value) for value in values])
    assert [value.hex() for value in scores.raw[:, 0].tolist()] == [
        float(value).hex() for value in values
    ]


def test_faults_become_invalid_and_never_zero():
    scores = score(reward("faulty"), reward("one"), texts=list(FAULTS), num_workers=1)
    for sample_id, (name, (_, reason)) in enumerate(FAULTS.items()):
        assert scores.reasons.get((sample_id, "faulty"), "") == reason, name
        assert scores.valid[sample_id].tolist() == [name == "fine", True]
        assert math.isnan(scores.raw[sample_id, 0]) == (name != "fine")
    assert scores.values[-1, 0] == 0.5
    assert (scores.values[:, 1] == 1.0).all()
    assert not scores.not_applicable.any()
    assert scores.num_invalid["one"] == {}
    assert scores.num_invalid["faulty"] == {
        "raised ValueError": 3, "raised SystemExit": 1, "raised Unprintable": 1,
        "returned NoneType": 1, "returned str": 1, "returned list": 1, "returned ndarray": 1,
        "returned complex": 1, "not finite": 3, "no oracle": 2, "returned coroutine": 1,
    }  # fmt: skip
    assert scores.report.num_restarts == scores.report.num_retries == 0
    # Of the first row that raised, for the log.
    assert list(scores.tracebacks) == ["faulty"]
    assert "raise kind(*args)" in scores.tracebacks["faulty"]
    assert "bad row" in scores.tracebacks["faulty"]


def test_not_applicable_is_neither_a_score_nor_a_fault():
    scores = score(reward("only_math"), texts=["math", "chat", "chat"])
    assert scores.valid[:, 0].tolist() == [True, False, False]
    assert scores.not_applicable[:, 0].tolist() == [False, True, True]
    assert scores.num_invalid == {"only_math": {}}
    assert scores.num_not_applicable == {"only_math": 2}
    assert scores.reasons[1, "only_math"] == "not applicable"


def test_async_rewards_wait_side_by_side():
    scores = score(
        reward("together", args={"num": 8}), texts=[str(i) for i in range(8)], num_workers=1
    )
    assert scores.values[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]


def test_so_many_async_calls_at_a_time_and_no_more():
    scores = score(
        reward("side_by_side", args={"num": 3}), texts=["x"] * 10, max_concurrent_async=3
    )
    assert max(scores.values[:, 0].tolist()) == 3.0 and scores.valid.all()


def test_batch_rewards_get_each_complete_group_in_order():
    with suite(
        mine("rank", "rank", args={"scale": 10}), reward("group_mean"), group_size=3, num_workers=1
    ) as running:
        for sample_id, text in [(4, "e"), (1, "c"), (2, "a"), (5, "d"), (0, "b"), (3, "f")]:
            running.submit(rollout(sample_id, text, group_size=3))
        scores = running.collect()
    # The place of each text in the group as the function got it.
    assert scores.values[:, 0].tolist() == [0.0, 10.0, 20.0] * 2
    assert scores.values[:, 1].tolist() == [98.0] * 3 + [101.0] * 3


def test_batch_faults_stay_in_their_group():
    scores = score(reward("faulty_batch"), texts=[k for k in BATCH_RESULTS for _ in range(2)])
    wrong = [name for name in BATCH_RESULTS if name not in ("one bad", "fine")]
    assert not scores.valid[: 2 * len(wrong)].any()
    assert scores.values[-3:, 0].tolist() == [0.5, 0.25, 0.5]
    name = "faulty_batch"
    assert scores.reasons[0, name] == "wrong number of results: 1 results for 2 samples"
    assert scores.reasons[3, name] == "wrong number of results: 3 results for 2 samples"
    assert scores.num_invalid[name] == {
        "wrong number of results": 4, "returned str": 2, "returned dict": 2, "returned set": 2,
        "returned generator": 2, "returned NoneType": 3, "returned coroutine": 2,
        "raised ZeroDivisionError": 2,
    }  # fmt: skip


def test_an_incomplete_group_is_invalid_for_batch_rewards_only():
    scores = score(reward("rank"), reward("one"), texts=["a", "b", "c"])
    assert scores.valid.tolist() == [[True, True], [True, True], [False, True]]
    assert scores.num_invalid["rank"] == {"group incomplete": 1}


def test_an_aborted_completion_is_not_judged():
    with suite(reward("counts"), reward("rank"), reward("countdown")) as running:
        running.submit(rollout(0, "part", finish_reason="abort"))
        running.submit(rollout(1, "whole"))
        scores = running.collect()
    assert scores.report.events["counts"] == {"seen": 1, "letters": 5}
    assert scores.valid.tolist() == [[False] * 3, [True] * 3]
    assert scores.values[1].tolist() == [0.0, 1.0, 1.0]
    assert scores.num_invalid["counts"] == {"completion aborted": 1}


def test_state_is_kept_and_calls_are_in_order_of_sample_id():
    values: list[list[list[float]]] = []
    for num_workers in (1, 4):
        of_steps: list[list[float]] = []
        with suite(
            reward("countdown"), reward("novelty"), reward("one"), num_workers=num_workers
        ) as running:
            for _ in range(2):
                order = list(range(6))
                random.Random(num_workers).shuffle(order)
                for sample_id in order:
                    running.submit(rollout(sample_id, str(sample_id)))
                of_steps += running.collect().values.T.tolist()
        values.append(of_steps)
    assert values[0] == values[1]
    countdown, novelty, one = values[0][:3]
    assert countdown == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0] and one == [1.0] * 6
    assert novelty == [0.0, 0.0, 2.0, 2.0, 4.0, 4.0]
    assert values[0][3] == [7.0, 8.0, 9.0, 10.0, 11.0, 12.0]
    assert values[0][4] == [6.0, 6.0, 8.0, 8.0, 10.0, 10.0]


def test_gates():
    scores = score(
        mine("length", "part", args={"index": 1}, when=GateConfig(reward="correct", gte=1.0)),
        mine("correct", "part", args={"index": 0}),
        texts=["1 5", "2 5", "0.999 5", "x 5", "n 5", "1 x", "0.5 x", "1 n", "x x"],
    )
    gated, valid = scores.values[:, 0].tolist(), scores.valid[:, 0].tolist()
    # The bound is inclusive; below it the value is 0; a missing condition is a missing value; and
    # a value that is missing itself stays so, whatever the condition says.
    assert gated[:3] == [5.0, 5.0, 0.0]
    assert valid == [True, True, True, False, False, False, False, False, False]
    assert scores.raw[:, 0].tolist()[:5] == [5.0] * 5
    assert scores.not_applicable[:, 0].tolist() == [i in (4, 7) for i in range(9)]
    reasons = {row: scores.reasons[row, "length"] for row in range(3, 9)}
    assert reasons == {
        3: "condition missing: 'correct': gone 0",
        4: "not applicable",
        5: "gone 1",
        6: "gone 1",
        7: "not applicable",
        8: "gone 1",
    }
    assert scores.num_invalid["length"] == {"condition missing": 1, "gone 1": 3}
    assert scores.num_invalid["correct"] == {"gone 0": 2}
    assert scores.num_not_applicable == {"length": 2, "correct": 1}


def test_chained_gates_look_at_raw_values():
    scores = score(
        mine("a", "part", args={"index": 0}, when=GateConfig(reward="b", gte=1.0)),
        mine("b", "part", args={"index": 1}, when=GateConfig(reward="c", gte=1.0)),
        mine("c", "part", args={"index": 2}),
        texts=["3 1 0", "3 1 1", "3 0 1", "3 1 x", "3 x 1"],
    )
    # Row 0: b is gated to 0 by c, yet a looks at b's raw 1. Row 3: c missing takes b, not a.
    assert scores.values[0].tolist() == [3.0, 0.0, 0.0]
    assert scores.values[1].tolist() == [3.0, 1.0, 1.0]
    assert scores.values[2].tolist() == [0.0, 0.0, 1.0]
    assert scores.valid[3].tolist() == [True, False, False] and scores.values[3, 0] == 3.0
    assert scores.valid[4].tolist() == [False, False, True]
    assert scores.reasons[3, "b"] == "condition missing: 'c': gone 2"


def test_to_matrix():
    with suite(
        mine("odd", "part", args={"index": 0}), reward("digits", "gsm8k_integer")
    ) as running:
        for sample_id, text in [(7, "x"), (3, "1"), (2, "2.5")]:
            running.submit(rollout(sample_id, text))
        scores = running.collect()
    group_ids = torch.tensor([1, 1, 3])
    matrix = scores.to_matrix(group_ids)
    assert matrix.names == ("odd", "digits")
    assert matrix.values[:2].tolist() == [[2.5, 0.0], [1.0, 1.0]]
    assert matrix.valid.tolist() == [[True, True], [True, True], [False, True]]
    assert matrix.reasons == {(2, "odd"): "gone 0"}
    assert torch.equal(matrix.group_ids, group_ids)


def test_scores_do_not_depend_on_the_number_of_workers_or_the_order_of_arrival():
    configs = (
        reward("uneven"),
        reward("later"),
        mine("group", "share", when=GateConfig(reward="uneven", gte=2.0)),
    )
    baseline: RewardScores | None = None
    for num_workers in (1, 2, 4):
        order = list(range(48))
        random.Random(num_workers).shuffle(order)
        with suite(*configs, group_size=4, num_workers=num_workers) as running:
            for sample_id in order:
                running.submit(rollout(sample_id, str(sample_id), group_size=4))
            scores = running.collect()
        baseline = baseline or scores
        assert_same(scores, baseline)
        assert "row 0" in scores.tracebacks["uneven"]
    assert baseline is not None and baseline.num_invalid["uneven"] == {"raised ValueError": 7}


def test_scoring_starts_before_collect_and_a_slow_one_delays_nobody(tmp_path: Path):
    with suite(reward("rendezvous", args={"folder": str(tmp_path)})) as running:
        running.submit(rollout(0, "slow"))
        for sample_id in range(1, 9):
            running.submit(rollout(sample_id, str(sample_id)))
        done = [tmp_path / f"done_{sample_id}" for sample_id in range(1, 9)]
        # While the slow one still waits, and before collect.
        wait_until(lambda: all(path.exists() for path in done), "the slow sample delays others")
        (tmp_path / "release").touch()
        assert running.collect().valid.all()


def test_events_are_summed_by_reward():
    scores = score(reward("counts"), reward("one"), texts=["ab", "", "abc"])
    assert scores.report.events == {"counts": {"seen": 3, "letters": 5}, "one": {}}


def test_misuse_is_told():
    with suite(reward("digits", "gsm8k_integer")) as running:
        running.submit(rollout(0))
        with pytest.raises(ValueError, match="sample_id 0 was submitted twice"):
            running.submit(rollout(0))
        running.submit(rollout(1))
        stray = rollout(4)
        crowded = Rollout(
            group_id=0, sample_id=9, prompt=stray.prompt, completion=stray.completion,
            policy_version=0,
        )  # fmt: skip
        with pytest.raises(ValueError, match="group 0 has more than 2 rollouts"):
            running.submit(crowded)
    with pytest.raises(RuntimeError, match="the reward suite is closed"):
        running.submit(rollout(5))
    running.close()  # a second time is fine


def test_answer_problems_come_from_the_rewards_of_the_run():
    with suite(reward("format", "tool_call_format"), reward("digits", "gsm8k_integer")) as running:
        assert running.answer_problems("<think> a </think>\n<response> b </response>") == []
        assert running.answer_problems(None) == []
        (problem,) = running.answer_problems("<tool_call>\n{\n</tool_call>")
    assert problem.startswith("reward 'format': ground truth, call 1 is not JSON on one line")


def test_rewards_from_a_file_run_like_others(tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "def vowels(sample):\n    return sample.completion.count('a')\n"
    )
    vowels = reward("vowels", "./mine.py:vowels")
    with RewardSuite([vowels], group_size=2, base_dir=tmp_path) as running:
        running.submit(rollout(0, "banana"))
        assert running.collect().values.tolist() == [[3.0]]
