"""The suite in numbers: forms, conditions, faults, and that the size of the pool does not show.

Not covered: a reward that never returns (there is no time limit), and killed worker processes
(rewards run in threads).
"""

from __future__ import annotations

import asyncio
import math
import random
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gdpo_megatron.config.schema import GateConfig, RewardConfig
from gdpo_megatron.rewards import NOT_APPLICABLE, RewardSample, invalid, register_reward
from gdpo_megatron.rewards.scores import RewardScores
from gdpo_megatron.rewards.suite import RewardSuite
from gdpo_megatron.types import Completion, Prompt, Rollout

NAN = float("nan")


def rollout(sample_id: int, text: str = "", *, group_size: int = 2, **fields: Any) -> Rollout:
    num_tokens = fields.pop("num_tokens", 1)
    return Rollout(
        group_id=sample_id // group_size,
        sample_id=sample_id,
        prompt=Prompt(
            prompt_id=f"row{sample_id}",
            token_ids=(1,),
            text=fields.pop("prompt", "Q"),
            answer=fields.pop("answer", None),
            metadata=fields.pop("metadata", {}),
        ),
        completion=Completion(
            token_ids=(5,) * num_tokens,
            logprobs=(0.0,) * num_tokens,
            text=text,
            finish_reason=fields.pop("finish_reason", "stop"),
        ),
        policy_version=0,
    )


def suite(*rewards: RewardConfig, group_size: int = 2, num_workers: int = 2) -> RewardSuite:
    return RewardSuite(rewards, group_size=group_size, num_workers=num_workers)


def reward(name: str, type: str | None = None, **fields: Any) -> RewardConfig:
    return RewardConfig(name=name, type=type or name, **fields)


def score(*rewards: RewardConfig, texts: Sequence[str], **options: Any) -> RewardScores:
    group_size = options.get("group_size", 2)
    with suite(*rewards, **options) as running:
        for sample_id, text in enumerate(texts):
            running.submit(rollout(sample_id, text, group_size=group_size))
        return running.collect()


@pytest.fixture
def rewards(registry_restored: None) -> Iterator[Any]:
    """Registers functions under their own names."""

    def add(function: Any, *, name: str | None = None, batch: bool = False) -> RewardConfig:
        register_reward(name or function.__name__, batch=batch)(function)
        return reward(name or function.__name__)

    yield add


def assert_same(first: RewardScores, second: RewardScores) -> None:
    torch.testing.assert_close(first.raw, second.raw, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(first.values, second.values, rtol=0, atol=0, equal_nan=True)
    for field in ("sample_ids", "valid", "not_applicable"):
        assert torch.equal(getattr(first, field), getattr(second, field))
    for field in ("names", "reasons", "num_invalid", "num_not_applicable"):
        assert getattr(first, field) == getattr(second, field)
    assert first.tracebacks.keys() == second.tracebacks.keys()


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


def test_a_reward_sees_the_completion_alone(rewards):
    seen: list[RewardSample] = []

    def look(sample: RewardSample) -> float:
        seen.append(sample)
        return 0.0

    with suite(rewards(look)) as running:
        running.submit(rollout(0, "hi", prompt="P", answer="A", metadata={"k": 1}, num_tokens=3))
        running.collect()
    assert seen == [
        RewardSample(
            completion="hi", prompt="P", answer="A", metadata={"k": 1}, num_tokens=3,
            finish_reason="stop",
        )
    ]  # fmt: skip


def test_collect_starts_afresh_and_may_be_empty(rewards):
    with suite(rewards(lambda sample: 1.0, name="one")) as running:
        assert running.collect().values.shape == (0, 1)
        for _ in range(2):  # the same ids are used in every step
            running.submit(rollout(0))
            assert running.collect().sample_ids.tolist() == [0]
        empty = running.collect()
    assert empty.values.shape == empty.valid.shape == empty.not_applicable.shape == (0, 1)


def test_numbers_that_are_scores(rewards):
    values = [True, 2, 0.5, np.float32(0.25), np.int64(3), np.bool_(False), torch.tensor(1.5)]

    def value_of(sample: RewardSample) -> object:
        return values[int(sample.completion)]

    scores = score(rewards(value_of), texts=[str(i) for i in range(len(values))])
    assert scores.values[:, 0].tolist() == [1.0, 2.0, 0.5, 0.25, 3.0, 0.0, 1.5]
    assert scores.valid.all()


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no message")


def test_faults_become_invalid_and_never_zero(rewards):
    def boom(kind: type[BaseException], *args: object) -> Any:
        raise kind(*args)

    async def forgotten() -> float:
        return 1.0

    faults: dict[str, tuple[Any, str]] = {
        "raise": (lambda: boom(ValueError, "bad row"), "raised ValueError: bad row"),
        "exit": (lambda: sys.exit(3), "raised SystemExit: 3"),
        "unprintable": (
            lambda: boom(Unprintable),
            "raised Unprintable: (its message cannot be shown)",
        ),
        "long": (lambda: boom(ValueError, "x" * 1000), f"raised ValueError: {'x' * 200}..."),
        "none": (lambda: None, "returned NoneType: None"),
        "string": (lambda: "1.0", "returned str: '1.0'"),
        "list": (lambda: [1.0], "returned list: [1.0]"),
        "array": (lambda: np.array([1.0]), "returned ndarray: array([1.])"),
        "complex": (lambda: 1j, "returned complex: 1j"),
        "nan": (lambda: NAN, "not finite: returned nan"),
        "inf": (lambda: -math.inf, "not finite: returned -inf"),
        "huge": (lambda: 10**400, "not finite: returned inf"),
        "said": (lambda: invalid("no oracle", "row 7"), "no oracle: row 7"),
        "short": (lambda: invalid("no oracle"), "no oracle"),
        "forgotten": (
            forgotten,
            "returned coroutine: declare the function with 'async def'",
        ),
        "fine": (lambda: 0.5, ""),
    }

    def faulty(sample: RewardSample) -> Any:
        return faults[sample.completion][0]()

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        scores = score(
            rewards(faulty), rewards(lambda sample: 1.0, name="other"), texts=list(faults)
        )
    assert [str(warning.message) for warning in warned] == []
    for sample_id, (name, (_, reason)) in enumerate(faults.items()):
        assert scores.reasons.get((sample_id, "faulty"), "") == reason, name
        assert scores.valid[sample_id].tolist() == [name == "fine", True]
        assert math.isnan(scores.raw[sample_id, 0]) == (name != "fine")
    assert scores.values[-1, 0] == 0.5
    assert (scores.values[:, 1] == 1.0).all()
    assert not scores.not_applicable.any()
    assert scores.num_invalid["other"] == {}
    assert scores.num_invalid["faulty"] == {
        "raised ValueError": 2, "raised SystemExit": 1, "raised Unprintable": 1,
        "returned NoneType": 1, "returned str": 1, "returned list": 1, "returned ndarray": 1,
        "returned complex": 1, "not finite": 3, "no oracle": 2, "returned coroutine": 1,
    }  # fmt: skip
    # Of the first row that raised, for the log.
    assert list(scores.tracebacks) == ["faulty"]
    assert "raise kind(*args)" in scores.tracebacks["faulty"]
    assert "bad row" in scores.tracebacks["faulty"]


def test_not_applicable_is_neither_a_score_nor_a_fault(rewards):
    def only_math(sample: RewardSample) -> Any:
        return 1.0 if sample.completion == "math" else NOT_APPLICABLE

    scores = score(rewards(only_math), texts=["math", "chat", "chat"])
    assert scores.valid[:, 0].tolist() == [True, False, False]
    assert scores.not_applicable[:, 0].tolist() == [False, True, True]
    assert scores.num_invalid == {"only_math": {}}
    assert scores.num_not_applicable == {"only_math": 2}
    assert scores.reasons[1, "only_math"] == "not applicable"


def test_async_rewards_wait_side_by_side(rewards):
    arrived = 0
    all_arrived = asyncio.Event()

    async def together(sample: RewardSample) -> float:
        nonlocal arrived
        arrived += 1
        if arrived == 8:
            all_arrived.set()
        await all_arrived.wait()  # one after the other, this would never end
        return float(sample.completion)

    async def faulty(sample: RewardSample) -> Any:
        await asyncio.sleep(0)
        return 1.0 if sample.completion == "1" else None

    async def leaving(sample: RewardSample) -> float:
        sys.exit(1)

    scores = score(
        rewards(together),
        rewards(faulty),
        rewards(leaving),
        texts=[str(i) for i in range(8)],
        num_workers=1,
    )
    assert scores.values[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert scores.valid[:, 1].tolist() == [False, True] + [False] * 6
    assert scores.num_invalid["leaving"] == {"raised SystemExit": 8}


def test_batch_rewards_get_each_complete_group_once_in_order(rewards):
    calls: list[list[str]] = []

    def rank(samples: Sequence[RewardSample], scale: float = 1.0) -> list[float]:
        texts = [sample.completion for sample in samples]
        calls.append(texts)
        return [scale * sorted(texts).index(text) for text in texts]

    async def mean(samples: Sequence[RewardSample]) -> np.ndarray:
        return np.full(len(samples), len(samples) / 2)

    rewards(rank, batch=True)
    rewards(mean, batch=True)
    with suite(
        reward("rank", args={"scale": 10}), reward("mean"), group_size=3, num_workers=1
    ) as running:
        for sample_id, text in [(4, "e"), (1, "c"), (2, "a"), (5, "d"), (0, "b"), (3, "f")]:
            running.submit(rollout(sample_id, text, group_size=3))
        scores = running.collect()
    assert sorted(calls) == [["b", "c", "a"], ["f", "e", "d"]]
    assert scores.values[:, 0].tolist() == [10.0, 20.0, 0.0, 20.0, 10.0, 0.0]
    assert scores.values[:, 1].tolist() == [1.5] * 6


def test_batch_faults_stay_in_their_group(rewards):
    async def forgotten() -> list[float]:
        return []

    returned: dict[str, Any] = {
        "few": lambda: [1.0],
        "many": lambda: [1.0] * 3,
        "string": lambda: "ab",
        "mapping": lambda: {0: 1.0, 1: 1.0},
        "set": lambda: {1.0, 2.0},
        "generator": lambda: (1.0 for _ in range(2)),
        "none": lambda: None,
        "coroutine": forgotten,
        "raise": lambda: 1 / 0,
        "one bad": lambda: [None, 0.5],
        "fine": lambda: torch.tensor([0.25, 0.5]),
    }

    def faulty(samples: Sequence[RewardSample]) -> Any:
        return returned[samples[0].completion]()

    scores = score(rewards(faulty, batch=True), texts=[k for k in returned for _ in range(2)])
    wrong = [name for name in returned if name not in ("one bad", "fine")]
    assert not scores.valid[: 2 * len(wrong)].any()
    assert scores.values[-3:, 0].tolist() == [0.5, 0.25, 0.5]
    assert scores.reasons[0, "faulty"] == "wrong number of results: 1 results for 2 samples"
    assert scores.reasons[3, "faulty"] == "wrong number of results: 3 results for 2 samples"
    assert scores.num_invalid["faulty"] == {
        "wrong number of results": 4, "returned str": 2, "returned dict": 2, "returned set": 2,
        "returned generator": 2, "returned NoneType": 3, "returned coroutine": 2,
        "raised ZeroDivisionError": 2,
    }  # fmt: skip


def test_an_incomplete_group_is_invalid_for_batch_rewards_only(rewards):
    scores = score(
        rewards(lambda samples: [1.0] * len(samples), name="batch", batch=True),
        rewards(lambda sample: 2.0, name="single"),
        texts=["a", "b", "c"],
    )
    assert scores.valid.tolist() == [[True, True], [True, True], [False, True]]
    assert scores.num_invalid["batch"] == {"group incomplete": 1}


def test_an_aborted_completion_is_not_judged(rewards):
    seen: list[str] = []

    def look(sample: RewardSample) -> float:
        seen.append(sample.completion)
        return 1.0

    with suite(
        rewards(look), rewards(lambda s: [1.0] * len(s), name="batch", batch=True)
    ) as running:
        running.submit(rollout(0, "part", finish_reason="abort"))
        running.submit(rollout(1, "whole"))
        scores = running.collect()
    assert seen == ["whole"]
    assert scores.valid.tolist() == [[False, False], [True, True]]
    assert scores.num_invalid["look"] == {"completion aborted": 1}


def test_gates(rewards):
    def number(sample: RewardSample) -> Any:
        first = sample.completion.split()[0]
        return {"x": invalid("no oracle"), "n": NOT_APPLICABLE}.get(first) or float(first)

    def length(sample: RewardSample) -> Any:
        last = sample.completion.split()[1]
        return {"x": invalid("cannot count"), "n": NOT_APPLICABLE}.get(last) or float(last)

    rewards(number, name="number_of")
    rewards(length, name="length_of")
    scores = score(
        reward("length", "length_of", when=GateConfig(reward="correct", gte=1.0)),
        reward("correct", "number_of"),
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
        3: "condition missing: 'correct': no oracle",
        4: "not applicable",
        5: "cannot count",
        6: "cannot count",
        7: "not applicable",
        8: "cannot count",
    }
    assert scores.num_invalid["length"] == {"condition missing": 1, "cannot count": 3}
    assert scores.num_invalid["correct"] == {"no oracle": 2}
    assert scores.num_not_applicable == {"length": 2, "correct": 1}


def test_chained_gates_look_at_raw_values(rewards):
    def part(sample: RewardSample, index: int) -> Any:
        value = sample.completion.split()[index]
        return invalid("gone") if value == "x" else float(value)

    rewards(part)
    scores = score(
        reward("a", "part", args={"index": 0}, when=GateConfig(reward="b", gte=1.0)),
        reward("b", "part", args={"index": 1}, when=GateConfig(reward="c", gte=1.0)),
        reward("c", "part", args={"index": 2}),
        texts=["3 1 0", "3 1 1", "3 0 1", "3 1 x", "3 x 1"],
    )
    # Row 0: b is gated to 0 by c, yet a looks at b's raw 1. Row 3: c missing takes b, not a.
    assert scores.values[0].tolist() == [3.0, 0.0, 0.0]
    assert scores.values[1].tolist() == [3.0, 1.0, 1.0]
    assert scores.values[2].tolist() == [0.0, 0.0, 1.0]
    assert scores.valid[3].tolist() == [True, False, False] and scores.values[3, 0] == 3.0
    assert scores.valid[4].tolist() == [False, False, True]
    assert scores.reasons[3, "b"] == "condition missing: 'c': gone"


def test_to_matrix(rewards):
    def odd(sample: RewardSample) -> Any:
        return float(sample.completion) if sample.completion != "x" else invalid("x", "row")

    with suite(rewards(odd), reward("digits", "gsm8k_integer")) as running:
        for sample_id, text in [(7, "x"), (3, "1"), (2, "2.5")]:
            running.submit(rollout(sample_id, text))
        scores = running.collect()
    group_ids = torch.tensor([1, 1, 3])
    matrix = scores.to_matrix(group_ids)
    assert matrix.names == ("odd", "digits")
    assert matrix.values[:2].tolist() == [[2.5, 0.0], [1.0, 1.0]]
    assert matrix.valid.tolist() == [[True, True], [True, True], [False, True]]
    assert matrix.reasons == {(2, "odd"): "x: row"}
    assert torch.equal(matrix.group_ids, group_ids)


def test_scores_do_not_depend_on_pool_size_or_order_of_arrival(rewards):
    def uneven(sample: RewardSample) -> Any:
        time.sleep(random.random() / 500)
        value = int(sample.completion)
        if value % 7 == 0:
            raise ValueError(f"row {value}")
        return NOT_APPLICABLE if value % 11 == 0 else value / 3

    async def later(sample: RewardSample) -> float:
        await asyncio.sleep(random.random() / 500)
        return float(sample.completion) ** 0.5

    def group(samples: Sequence[RewardSample]) -> list[float]:
        return [float(sample.completion) / len(samples) for sample in samples]

    rewards(group, batch=True)
    configs = (
        rewards(uneven),
        rewards(later),
        reward("group", when=GateConfig(reward="uneven", gte=2.0)),
    )
    baseline = None
    for num_workers in (1, 2, 8):
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


def test_scoring_starts_before_collect_and_a_slow_one_delays_nobody(rewards):
    release, done = threading.Event(), threading.Event()

    def waits(sample: RewardSample) -> float:
        if sample.completion == "slow":
            assert release.wait(10)
        else:
            done.set()
        return 1.0

    with suite(rewards(waits)) as running:
        running.submit(rollout(0, "slow"))
        running.submit(rollout(1, "fast"))
        assert done.wait(10)  # while the slow one still waits, and before collect
        release.set()
        assert running.collect().valid.all()


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
    with pytest.raises(RuntimeError):
        running.submit(rollout(5))
    running.close()  # a second time is fine


def test_close_does_not_wait_for_what_is_left(rewards):
    async def forever(sample: RewardSample) -> float:
        await asyncio.Event().wait()
        return 1.0

    running = suite(rewards(forever))
    running.submit(rollout(0))
    threads = {thread.name for thread in threading.enumerate()}
    assert "reward-async" in threads
    running.close()
    assert "reward-async" not in {thread.name for thread in threading.enumerate()}


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
    with RewardSuite(
        [reward("vowels", "./mine.py:vowels")], group_size=2, num_workers=1, base_dir=tmp_path
    ) as running:
        running.submit(rollout(0, "banana"))
        assert running.collect().values.tolist() == [[3.0]]
