"""What every rollout engine must do, whatever it is: the words of rollout/base.py, one by one.

Run against the native engine and vLLM on a small random Qwen3 and against an engine that answers
from a table, so that a clause is about the protocol and not about one engine. Not covered: what an
engine generates (tests/unit/rollout) and engines over several ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from support.engines import (
    ScriptedEngine,
    drain,
    folder_tensors,
    greedy,
    native_engine,
    request,
    vllm_engine,
)
from torch import Tensor

from gdpo_megatron.rollout.base import (
    FinishedCompletion,
    RolloutEngine,
    RolloutRequest,
    SamplingParams,
    generate,
)
from gdpo_megatron.types import Completion

MAX_LENGTH, MAX_TOKENS = 24, 8
PROMPTS = [(5, 6, 7), (40, 41), (200,), (9, 8, 7, 6, 5), (77, 78)]


@dataclass(frozen=True)
class Case:
    """An engine without weights, and the tensors that it wants."""

    engine: RolloutEngine
    tensors: dict[str, Tensor]
    sampling: SamplingParams

    def load(self, version: int = 3) -> RolloutEngine:
        self.engine.load_weights(self.tensors.items(), version)
        return self.engine


def scripted_case() -> Case:
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    # Two of them end before the limit, and not together.
    lengths = [9, 3, 9, 5, 9]
    answers = {p: tuple(range(10, 10 + n)) for p, n in zip(PROMPTS, lengths, strict=True)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Case(ScriptedEngine(answers, shapes, MAX_LENGTH), tensors, greedy(MAX_TOKENS))


@pytest.fixture(scope="module")
def vllm(model_folder: Callable[[str], Path]) -> Iterator[RolloutEngine]:
    with vllm_engine(model_folder("qwen3"), max_sequence_length=MAX_LENGTH) as engine:
        yield engine


@pytest.fixture(
    params=["native", "native_one_row", "scripted", pytest.param("vllm", marks=pytest.mark.vllm)]
)
def case(request: pytest.FixtureRequest, model_folder: Callable[[str], Path]) -> Iterator[Case]:
    if request.param == "scripted":
        yield scripted_case()
        return
    folder = model_folder("qwen3")
    engine: RolloutEngine
    if request.param == "vllm":
        # Started once, as that takes long; asleep it is as new.
        engine = request.getfixturevalue("vllm")
        engine.wake()
        engine.load_weights(folder_tensors(folder).items(), 0)
    else:
        rows = 1 if request.param == "native_one_row" else 64
        engine = native_engine(
            folder, max_sequence_length=MAX_LENGTH, max_concurrent_sequences=rows
        )
    yield real_case(engine, folder)
    engine.abort(range(len(PROMPTS) + 100))
    drain(engine)
    engine.sleep()


def real_case(engine: RolloutEngine, folder: Path) -> Case:
    # A token of one greedy completion ends it earlier than the others.
    engine.submit(requests(), greedy(MAX_TOKENS))
    tokens = [it.completion.token_ids for _, it in sorted(drain(engine).items())]
    stop = next(
        t for t in tokens[1][2:] if all(t not in other for other in tokens if other != tokens[1])
    )
    engine.sleep()
    return Case(engine, folder_tensors(folder), greedy(MAX_TOKENS, stop_token_ids=(stop,)))


def requests() -> list[RolloutRequest]:
    return [request(i, prompt) for i, prompt in enumerate(PROMPTS)]


def assert_same(done: dict[int, FinishedCompletion], whole: dict[int, FinishedCompletion]) -> None:
    """Equal but for the rounding of log-probs, which batches of other sizes change."""
    assert done.keys() <= whole.keys()
    for i, it in done.items():
        other = whole[i]
        assert it.completion.token_ids == other.completion.token_ids
        assert it.completion.finish_reason == other.completion.finish_reason
        assert it.completion.text == other.completion.text
        assert it.completion.logprobs == pytest.approx(other.completion.logprobs, abs=1e-5)
        assert it.policy_version == other.policy_version


# ---- weights -------------------------------------------------------------------------------------


def test_nothing_can_be_submitted_before_weights_are_loaded(case: Case):
    engine = case.engine
    assert engine.policy_version is None and engine.num_unfinished == 0
    with pytest.raises(RuntimeError):
        engine.submit(requests(), case.sampling)
    assert engine.num_unfinished == 0 and engine.poll() == []
    engine.wake()
    assert engine.policy_version is None
    with pytest.raises(RuntimeError):
        engine.submit(requests(), case.sampling)


def test_completions_carry_the_version_of_the_last_sync(case: Case):
    for version in (3, 0, 12):
        engine = case.load(version)
        assert engine.policy_version == version
        engine.submit(requests(), case.sampling)
        assert {it.policy_version for it in drain(engine).values()} == {version}


@pytest.mark.parametrize("fault", ["missing", "doubled", "misshaped", "unknown", "raises"])
def test_a_failed_sync_leaves_no_version(case: Case, fault: str):
    case.load(3)
    names = list(case.tensors)
    items = list(case.tensors.items())
    shape = (*case.tensors[names[-1]].shape, 1)
    bad = {
        "missing": items[:-1],
        "doubled": [*items, items[0]],
        "misshaped": [*items[:-1], (names[-1], torch.zeros(shape))],
        "unknown": [*items, ("no.such.weight", torch.zeros(1))],
        "raises": items,
    }[fault]

    def stream():
        yield from bad[:-1]
        if fault == "raises":
            raise RuntimeError("the policy's side fails")
        yield bad[-1]

    with pytest.raises(RuntimeError):
        case.engine.load_weights(stream(), 4)
    # Some tensors of version 4 have been taken: it is neither the old policy nor the new one.
    assert case.engine.policy_version is None
    with pytest.raises(RuntimeError):
        case.engine.submit(requests(), case.sampling)
    assert case.load(5).policy_version == 5


def test_a_sync_leaves_the_engine_with_a_copy(case: Case):
    engine = case.load(1)
    engine.submit(requests(), case.sampling)
    expected = drain(engine)
    tensors = {name: tensor.clone() for name, tensor in case.tensors.items()}
    engine.load_weights(tensors.items(), 1)
    for tensor in tensors.values():
        tensor.fill_(float("nan"))
    engine.submit(requests(), case.sampling)
    assert drain(engine) == expected


def test_no_sync_and_no_sleep_while_requests_are_unfinished(case: Case):
    engine = case.load(3)
    engine.submit(requests(), case.sampling)
    with pytest.raises(RuntimeError):
        engine.load_weights(case.tensors.items(), 4)
    with pytest.raises(RuntimeError):
        engine.sleep()
    assert engine.policy_version == 3
    assert len(drain(engine)) == len(PROMPTS)
    engine.load_weights(case.tensors.items(), 4)


def test_sleep_forgets_the_weights_and_wake_with_a_sync_brings_them_back(case: Case):
    engine = case.load(3)
    engine.submit(requests(), case.sampling)
    expected = drain(engine)
    for _ in range(2):
        engine.sleep()
        assert engine.policy_version is None
        with pytest.raises(RuntimeError):
            engine.submit(requests(), case.sampling)
        engine.wake()
        engine.wake()
        assert engine.policy_version is None
        case.load(3)
        engine.submit(requests(), case.sampling)
        assert drain(engine) == expected
    engine.sleep()
    engine.sleep()


# ---- requests ------------------------------------------------------------------------------------


def test_every_request_comes_back_once(case: Case):
    engine = case.load()
    engine.submit(requests(), case.sampling)
    left = len(PROMPTS)
    assert engine.num_unfinished == left
    ids: list[int] = []
    num_polls = 0
    while left:
        finished = engine.poll()
        assert finished
        num_polls += 1
        ids += [it.request_id for it in finished]
        left -= len(finished)
        assert engine.num_unfinished == left
        for it in finished:
            completion = it.completion
            assert 0 < len(completion.token_ids) <= MAX_TOKENS
            assert len(completion.logprobs) == len(completion.token_ids)
            assert all(logprob <= 0 for logprob in completion.logprobs)
            assert completion.finish_reason in ("stop", "length")
            if completion.finish_reason == "length":
                assert len(completion.token_ids) == MAX_TOKENS
    assert sorted(ids) == list(range(len(PROMPTS)))
    assert num_polls > 1, "all finished together: this case shows nothing"
    assert engine.poll() == []


def test_a_completion_ends_where_the_sequence_is_full(case: Case):
    engine = case.load()
    if isinstance(engine, ScriptedEngine):
        engine._answers = {tuple(range(1, 23)): (1, 2, 3, 4)}
    engine.submit([request(0, range(1, 23))], case.sampling)
    completion = drain(engine)[0].completion
    assert len(completion.token_ids) == MAX_LENGTH - 22 and completion.finish_reason == "length"


def test_an_id_is_free_again_when_its_completion_was_returned(case: Case):
    engine = case.load()
    engine.submit(requests(), case.sampling)
    first = drain(engine)
    engine.submit(requests(), case.sampling)
    assert drain(engine) == first


def test_requests_can_be_added_while_others_run(case: Case):
    engine = case.load()
    engine.submit(requests(), case.sampling)
    alone = drain(engine)
    engine.submit(requests()[:3], case.sampling)
    early = engine.poll()
    engine.submit(requests()[3:], case.sampling)
    assert engine.num_unfinished == len(PROMPTS) - len(early)
    done = drain(engine) | {it.request_id: it for it in early}
    assert done.keys() == alone.keys()
    assert_same(done, alone)


@pytest.mark.parametrize(
    "bad",
    [
        [request(50, (5, 6)), request(50, (5, 6))],
        [request(50, (5, 6)), request(1, (5, 6))],
        [request(50, (5, 6)), request(51, ())],
        [request(50, (5, 6)), request(51, range(MAX_LENGTH))],
    ],
    ids=["doubled", "in use", "empty prompt", "no room"],
)
def test_a_refused_submit_leaves_nothing_behind(case: Case, bad: list):
    engine = case.load()
    engine.submit(requests(), case.sampling)
    with pytest.raises(ValueError):
        engine.submit(bad, case.sampling)
    assert engine.num_unfinished == len(PROMPTS)
    assert sorted(drain(engine)) == list(range(len(PROMPTS)))
    engine.submit([request(50, PROMPTS[0])], case.sampling)
    assert sorted(drain(engine)) == [50]


def test_unfinished_requests_share_their_sampling_parameters(case: Case):
    engine = case.load()
    engine.submit(requests()[:2], case.sampling)
    with pytest.raises(ValueError):
        engine.submit(requests()[2:], greedy(MAX_TOKENS - 1))
    assert sorted(drain(engine)) == [0, 1]
    engine.submit(requests(), greedy(2))
    assert {len(it.completion.token_ids) for it in drain(engine).values()} == {2}


# ---- abort ---------------------------------------------------------------------------------------


def test_aborted_requests_are_returned_by_poll_with_what_they_have(case: Case):
    engine = case.load()
    engine.submit(requests(), case.sampling)
    whole = drain(engine)
    engine.submit(requests(), case.sampling)
    early = {it.request_id: it for it in engine.poll()}
    aborted = [i for i in range(len(PROMPTS)) if i not in early][:2]
    engine.abort([*aborted, 999])
    assert engine.num_unfinished == len(PROMPTS) - len(early)
    done = drain(engine) | early
    assert sorted(done) == list(range(len(PROMPTS)))
    for i in aborted:
        completion, n = done[i].completion, len(done[i].completion.token_ids)
        assert completion.finish_reason == "abort"
        assert completion.token_ids == whole[i].completion.token_ids[:n]
        assert completion.logprobs == pytest.approx(whole[i].completion.logprobs[:n], abs=1e-5)
    assert_same({i: it for i, it in done.items() if i not in aborted}, whole)


def test_an_abort_of_all_ends_with_all_of_them_polled(case: Case):
    engine = case.load()
    engine.submit(requests(), case.sampling)
    engine.abort(range(len(PROMPTS)))
    assert engine.num_unfinished == len(PROMPTS)
    with pytest.raises(RuntimeError):
        engine.sleep()
    done = drain(engine)
    assert sorted(done) == list(range(len(PROMPTS)))
    assert {it.completion.finish_reason for it in done.values()} == {"abort"}
    assert {it.completion.token_ids for it in done.values()} == {()}
    engine.abort([0])
    assert engine.poll() == []
    engine.submit(requests(), case.sampling)
    assert len(drain(engine)) == len(PROMPTS)


def test_an_abort_of_what_is_finished_changes_nothing(case: Case):
    engine = case.load()
    engine.submit(requests(), case.sampling)
    engine.abort([3])
    engine.abort([3])
    assert sorted(drain(engine)) == list(range(len(PROMPTS)))


def test_a_carried_completion_goes_on_where_it_was_broken_off(case: Case):
    engine = case.load()
    engine.submit(requests(), case.sampling)
    whole = drain(engine)
    before = engine.num_generated_tokens
    asked: list[RolloutRequest] = []
    for it, i in zip(requests(), sorted(whole), strict=True):
        completion = whole[i].completion
        n = min(i % 3, len(completion.token_ids) - 1)
        carried = Completion(
            token_ids=completion.token_ids[:n],
            # They are returned as they were given, whatever these weights say of them.
            logprobs=tuple(-7.0 - j for j in range(n)),
            text="",
            finish_reason="abort",
        )
        asked.append(replace(it, carried=carried))
    case.load(4)
    engine.submit(asked, case.sampling)
    for i, it in drain(engine).items():
        completion, expected, n = it.completion, whole[i].completion, asked[i].num_carried
        assert completion.token_ids == expected.token_ids
        assert completion.logprobs[:n] == asked[i].carried.logprobs
        assert completion.logprobs[n:] == pytest.approx(expected.logprobs[n:], abs=1e-5)
        assert (completion.text, completion.finish_reason) == (
            expected.text,
            expected.finish_reason,
        )
        assert it.policy_version == 4
    made = sum(len(it.completion.token_ids) for it in whole.values())
    assert engine.num_generated_tokens == before + made - sum(r.num_carried for r in asked)


def test_what_is_aborted_again_keeps_what_was_carried(case: Case):
    engine = case.load()
    carried = Completion(token_ids=(4, 5), logprobs=(-1.0, -2.0), text="", finish_reason="abort")
    engine.submit([replace(it, carried=carried) for it in requests()], case.sampling)
    engine.abort(range(len(PROMPTS)))
    for it in drain(engine).values():
        assert it.completion.token_ids[:2] == (4, 5)
        assert it.completion.logprobs[:2] == (-1.0, -2.0)
        assert it.completion.finish_reason == "abort"


def test_a_carried_completion_that_leaves_no_room_is_refused(case: Case):
    engine = case.load()
    carried = Completion(
        token_ids=(4,) * MAX_TOKENS,
        logprobs=(-1.0,) * MAX_TOKENS,
        text="",
        finish_reason="abort",
    )
    with pytest.raises(ValueError):
        engine.submit([*requests(), replace(request(9, (5, 6)), carried=carried)], case.sampling)
    assert engine.num_unfinished == 0


# ---- generate ------------------------------------------------------------------------------------


def test_generate_keeps_the_order_of_the_requests(case: Case):
    engine = case.load()
    seen: list[int] = []
    order = [3, 0, 4, 1, 2]
    results = generate(
        engine, [requests()[i] for i in order], case.sampling, lambda it: seen.append(it.request_id)
    )
    assert [it.request_id for it in results] == order
    assert sorted(seen) == sorted(order)
    assert generate(engine, [], case.sampling) == []


def test_generate_returns_what_was_aborted_meanwhile(case: Case):
    engine = case.load()
    results = generate(
        engine, requests(), case.sampling, lambda it: engine.abort(range(len(PROMPTS)))
    )
    assert [it.request_id for it in results] == list(range(len(PROMPTS)))
    assert "abort" in {it.completion.finish_reason for it in results}
