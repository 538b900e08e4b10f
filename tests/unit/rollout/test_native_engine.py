"""The native engine generates what transformers' model of the same folder says.

Token by token and log-prob by log-prob, whatever the batch around a completion is. The reference
is the float64 forward pass of the whole sequence, without a cache. Two engines may part only where
the two best (perturbed) logits are closer than TIE, which is shown at each place where they do.
Not covered: bfloat16, and GPUs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import drain, folder_tensors, greedy, native_engine, request
from torch import Tensor

from gdpo_megatron.certify.family_models import MODELS, reference_logits, reference_model
from gdpo_megatron.data.tokenizer import load_tokenizer
from gdpo_megatron.rollout.base import RolloutRequest, SamplingParams
from gdpo_megatron.rollout.native import NativeEngine
from gdpo_megatron.rollout.native.sampler import KeyedNoise, filter_support, split_keys
from gdpo_megatron.types import Completion

TIE = 1e-4

# Rounding of float32: transformers' own float32 pass is up to 1.6e-5 from its float64 pass on
# stories260K, whose logits reach 23, and 6e-6 on the random models; a temperature of 0.7 divides.
LOGPROB_ERROR = 3e-5


@pytest.fixture(scope="session", params=[*MODELS, "stories260K"])
def model(request: pytest.FixtureRequest, model_folder: Callable[[str], Path]) -> tuple[Path, Any]:
    """(folder, float64 transformers model)."""
    if request.param == "stories260K":
        folder = request.getfixturevalue("stories_folder")
    else:
        folder = model_folder(request.param)
    return folder, reference_model(folder)


@pytest.fixture
def gqa(model_folder: Callable[[str], Path]) -> Path:
    return model_folder("gqa")


def make_prompts(number: int, seed: int = 0, longest: int = 20) -> list[tuple[int, ...]]:
    """Random prompts of 1 to `longest` tokens, one of them three times."""
    rng = random.Random(seed)
    prompts = [
        tuple(rng.randrange(3, 300) for _ in range(rng.randint(1, longest)))
        for _ in range(number - 2)
    ]
    return [prompts[0], *prompts, prompts[0]]


def run(
    engine: NativeEngine, requests: Sequence[RolloutRequest], sampling: SamplingParams
) -> dict[int, Completion]:
    engine.submit(requests, sampling)
    return {i: it.completion for i, it in drain(engine).items()}


def distribution(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """Log-probs that tokens were drawn from, float64 [T, V]; see SamplingConfig."""
    scaled = logits / (sampling.temperature or 1.0)
    return filter_support(scaled.clone(), sampling.top_p, sampling.top_k).log_softmax(-1)


def perturbed(
    reference: Any, it: RolloutRequest, tokens: tuple[int, ...], sampling: SamplingParams
) -> Tensor:
    """What the drawn token is the largest of, float64 [T, V]."""
    logprobs = distribution(reference_logits(reference, it.prompt_token_ids, tokens), sampling)
    if sampling.temperature == 0:
        return logprobs
    noise = KeyedNoise(logprobs.shape[-1], torch.device("cpu"))
    keys = split_keys([it.noise_key], torch.device("cpu")).expand(len(tokens), 2)
    return logprobs + noise.gumbel(keys, torch.arange(len(tokens))).double()


def assert_drawn_from_reference(
    reference: Any, it: RolloutRequest, completion: Completion, sampling: SamplingParams
) -> None:
    """Each token is the best one, but for ties, and its log-prob is the reference's."""
    values = perturbed(reference, it, completion.token_ids, sampling)
    chosen = values.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    assert float((values.max(-1).values - chosen).max()) < TIE
    logits = reference_logits(reference, it.prompt_token_ids, completion.token_ids)
    logprobs = distribution(logits, sampling).gather(1, torch.tensor(completion.token_ids)[:, None])
    torch.testing.assert_close(
        torch.tensor(completion.logprobs).double(), logprobs[:, 0], rtol=0, atol=LOGPROB_ERROR
    )


def assert_same_or_tied(
    reference: Any, it: RolloutRequest, a: Completion, b: Completion, sampling: SamplingParams
) -> None:
    """Equal, or parted at a tie of the reference."""
    if a.token_ids == b.token_ids:
        assert (a.finish_reason, a.text) == (b.finish_reason, b.text)
        assert a.logprobs == pytest.approx(b.logprobs, abs=LOGPROB_ERROR)
        return
    where = next(
        i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=False)) if x != y
    )
    best = perturbed(reference, it, a.token_ids[: where + 1], sampling)[where].topk(2).values
    assert float(best[0] - best[1]) < TIE, f"request {it.request_id} parts at token {where}"


# ---- against transformers ------------------------------------------------------------------------


def test_greedy_tokens_are_those_of_transformers_generate(model: tuple[Path, Any]):
    folder, reference = model
    prompts = make_prompts(6)
    done = run(native_engine(folder), [request(i, p) for i, p in enumerate(prompts)], greedy(24))
    for i, prompt in enumerate(prompts):
        expected = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :]
        assert done[i].token_ids == tuple(expected.tolist())
        assert done[i].finish_reason == "length"


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.3, "top_k": 7},
        {"temperature": 0.9, "top_k": 40, "top_p": 0.95},
    ],
    ids=str,
)
def test_tokens_and_logprobs_are_those_of_a_whole_forward_pass(
    model: tuple[Path, Any], options: dict[str, float]
):
    """The log-prob is of what was drawn from: after the temperature, over the support."""
    folder, reference = model
    sampling = greedy(24, **options)
    requests = [request(i, prompt) for i, prompt in enumerate(make_prompts(8, seed=1))]
    done = run(native_engine(folder), requests, sampling)
    for it in requests:
        assert_drawn_from_reference(reference, it, done[it.request_id], sampling)
    if sampling.temperature:
        assert done[0].token_ids != done[7].token_ids, "one prompt, two keys, one completion"


def test_sampled_frequencies_are_the_softmax_of_the_model(gqa: Path):
    """First tokens of one prompt, and second tokens after the likeliest first one; chi-square."""
    number, prompt, sampling = 6000, (40, 41, 42), greedy(2, temperature=0.5)
    engine = native_engine(gqa, max_concurrent_sequences=number)
    done = run(engine, [request(i, prompt) for i in range(number)], sampling)
    reference = reference_model(gqa)
    firsts = torch.tensor([it.token_ids[0] for it in done.values()])
    likeliest = int(firsts.mode().values)
    seconds = torch.tensor(
        [it.token_ids[1] for it in done.values() if it.token_ids[0] == likeliest]
    )
    logits = reference_logits(reference, prompt, (likeliest, 0))
    for drawn, row in ((firsts, logits[0]), (seconds, logits[1])):
        expected = len(drawn) * (row / 0.5).softmax(-1)
        counts = torch.bincount(drawn, minlength=len(row)).double()
        rare = expected < 10  # chi-square wants at least a few in each bin
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        assert len(expected) > 3 and expected.max() < 0.9 * len(drawn), "not a peaked distribution"
        degrees = len(expected) - 1
        statistic = float(((counts - expected) ** 2 / expected).sum())
        assert statistic < degrees + 4 * math.sqrt(2 * degrees) + 6


# ---- the batch around a completion does not matter -----------------------------------------------


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.0}], ids=str)
def test_completions_do_not_depend_on_batch_size_or_order(
    model: tuple[Path, Any], options: dict[str, float]
):
    folder, reference = model
    requests = [request(i, prompt) for i, prompt in enumerate(make_prompts(20, seed=2))]
    # Rows end at many different times.
    free = run(native_engine(folder), requests, greedy(20, **options))
    stops = tuple(free[i].token_ids[i] for i in range(1, 8))
    sampling = greedy(20, stop_token_ids=stops, **options)
    shuffled = random.Random(3).sample(requests, len(requests))
    base = run(native_engine(folder, max_concurrent_sequences=64), requests, sampling)
    assert len({len(it.token_ids) for it in base.values()}) > 2
    others = [
        run(native_engine(folder, max_concurrent_sequences=rows), order, sampling)
        for rows, order in ((1, requests), (7, requests), (7, shuffled), (64, shuffled[::-1]))
    ]
    for other in others:
        assert other.keys() == base.keys()
        for it in requests:
            i = it.request_id
            assert_same_or_tied(reference, it, base[i], other[i], sampling)


def test_completions_do_not_depend_on_what_ran_before(gqa: Path):
    engine, sampling = native_engine(gqa), greedy(16, temperature=1.0)
    requests = [request(i, prompt) for i, prompt in enumerate(make_prompts(9, seed=4))]
    first = run(engine, requests, sampling)
    run(engine, [request(i, p) for i, p in enumerate(make_prompts(30, seed=5))], greedy(40))
    again = run(engine, requests, sampling)
    reference = reference_model(gqa)
    for it in requests:
        i = it.request_id
        assert_same_or_tied(reference, it, first[i], again[i], sampling)


def test_requests_may_come_while_others_run_and_the_cache_grows(gqa: Path):
    """More rows and longer sequences than what was reserved: what is there must survive."""
    reference = reference_model(gqa)
    sampling = greedy(30, temperature=1.0)
    prompts = make_prompts(20, seed=6)
    requests = [request(i, prompt) for i, prompt in enumerate(prompts)]
    requests += [request(20 + i, p * 3) for i, p in enumerate(prompts) if len(p) > 15]
    free = run(native_engine(gqa), requests, sampling)
    # What ends the first request early, so that the others are caught in the middle.
    sampling = replace(sampling, stop_token_ids=(free[0].token_ids[4],))
    alone = run(native_engine(gqa), requests, sampling)
    engine = native_engine(gqa)
    engine.submit(requests[:3], sampling)
    done = {it.request_id: it.completion for it in engine.poll()}
    assert 0 < engine.num_unfinished < 3 + len(requests)
    shape = engine._decoder.cache.shape
    for first, last in ((3, 10), (10, len(requests))):
        engine.submit(requests[first:last], sampling)
        done |= {it.request_id: it.completion for it in engine.poll()}
    grown = engine._decoder.cache.shape
    assert grown[2] > shape[2] and grown[4] > shape[4]
    done |= {i: it.completion for i, it in drain(engine).items()}
    assert done.keys() == alone.keys()
    for it in requests:
        assert_same_or_tied(reference, it, alone[it.request_id], done[it.request_id], sampling)


def test_rows_that_are_done_are_not_decoded(gqa: Path, monkeypatch: pytest.MonkeyPatch):
    """Rows decoded over the whole run: for every completion its tokens but the first."""
    requests = [request(i, prompt) for i, prompt in enumerate(make_prompts(12, seed=7))]
    free = run(native_engine(gqa), requests, greedy(16, temperature=1.0))
    stops = tuple({free[i].token_ids[3 + i] for i in range(6)})
    for rows in (64, 5):
        engine = native_engine(gqa, max_concurrent_sequences=rows)
        decoder, decoded = engine._decoder, []
        decode = decoder.decode

        def spy(tokens: Tensor, lengths: Tensor, longest: int, decode=decode, decoded=decoded):
            decoded.append(len(tokens))
            assert longest == int(lengths.max())
            return decode(tokens, lengths, longest)

        monkeypatch.setattr(decoder, "decode", spy)
        done = run(engine, requests, greedy(16, temperature=1.0, stop_token_ids=stops))
        lengths = [len(it.token_ids) for it in done.values()]
        assert len(set(lengths)) > 3
        assert sum(decoded) == sum(lengths) - len(lengths)
        assert max(decoded) <= rows


def test_waiting_requests_enter_as_rows_become_free(gqa: Path, monkeypatch: pytest.MonkeyPatch):
    """One long completion, and 70 short ones that pass through the other rows beside it."""
    free = run(native_engine(gqa), [request(0, (5,))], greedy(60))[0].token_ids
    stop = next(t for t in range(3, 300) if t not in free)
    engine = native_engine(gqa, max_concurrent_sequences=8)
    draw = engine._draw

    def short_ones_stop(logits: Tensor, rows: slice) -> None:
        is_short = [bool(a.request.request_id) for a in engine._active[rows]]
        logits[torch.tensor(is_short)] = torch.nn.functional.one_hot(
            torch.tensor(stop), logits.shape[1]
        ).float()
        draw(logits, rows)

    monkeypatch.setattr(engine, "_draw", short_ones_stop)
    requests = [request(i, (5,)) for i in range(71)]
    engine.submit(requests, greedy(60, stop_token_ids=(stop,)))
    order: list[int] = []
    while engine.num_unfinished:
        order += [it.request_id for it in engine.poll()]
    assert order[-1] == 0, "the short ones waited for the long one"


def test_equal_prompts_that_enter_together_are_prefilled_once(
    gqa: Path, monkeypatch: pytest.MonkeyPatch
):
    engine = native_engine(gqa)
    prefilled: list[tuple[int, int]] = []
    prefill = engine._decoder.prefill

    def spy(tokens: Tensor, lengths: Tensor, prompts: Tensor, rows: Tensor):
        prefilled.append((len(tokens), len(rows)))
        return prefill(tokens, lengths, prompts, rows)

    monkeypatch.setattr(engine._decoder, "prefill", spy)
    run(engine, [request(i, [(5, 6), (7, 8, 9)][i // 8]) for i in range(16)], greedy(4))
    assert prefilled == [(2, 16)]


def test_long_prompts_are_prefilled_in_several_passes(gqa: Path, monkeypatch: pytest.MonkeyPatch):
    """The bound on a pass changes nothing but the passes; a longer prompt goes alone."""
    requests = [request(i, prompt) for i, prompt in enumerate(make_prompts(12, seed=8))]
    whole = run(native_engine(gqa), requests, greedy(8))
    monkeypatch.setattr("gdpo_megatron.rollout.native.engine._PREFILL_TOKENS", 16)
    engine = native_engine(gqa)
    sizes: list[int] = []
    prefill = engine._decoder.prefill

    def spy(tokens: Tensor, *rest: Tensor):
        sizes.append(tokens.numel() if len(tokens) > 1 else 0)
        return prefill(tokens, *rest)

    monkeypatch.setattr(engine._decoder, "prefill", spy)
    parts = run(engine, requests, greedy(8))
    assert len(sizes) > 3 and max(sizes) <= 16
    reference = reference_model(gqa)
    for it in requests:
        i = it.request_id
        assert_same_or_tied(reference, it, whole[i], parts[i], greedy(8))


# ---- where a completion ends ---------------------------------------------------------------------


def test_a_stop_token_ends_a_completion_and_is_part_of_it(gqa: Path):
    free = run(native_engine(gqa), [request(0, (5, 6, 7))], greedy(20, temperature=1.0))[0]
    for where in (0, 1, 7, 19):
        stop = free.token_ids[where]
        first = free.token_ids.index(stop)
        sampling = greedy(20, temperature=1.0, stop_token_ids=(stop, 299))
        done = run(native_engine(gqa), [request(0, (5, 6, 7))], sampling)[0]
        assert done.token_ids == free.token_ids[: first + 1]
        # Also where the limit would have ended it with the same token.
        assert done.finish_reason == "stop"


def test_special_tokens_are_no_text(gqa: Path):
    """The end token is a token of the completion; its name is not in the text."""
    tokenizer = load_tokenizer(gqa)
    sampling = greedy(30, temperature=3.0, stop_token_ids=(1,))
    done = run(native_engine(gqa), [request(i, (5, 6)) for i in range(400)], sampling)
    ended = [it for it in done.values() if it.finish_reason == "stop"]
    assert ended and all(it.token_ids[-1] == 1 for it in ended)
    for it in done.values():
        assert it.text == tokenizer.decode(it.token_ids)
        assert "<eos>" not in it.text


def test_stop_strings_end_at_the_token_that_completes_them(gqa: Path):
    """Every substring of a completion's text, most of them across a border of tokens.

    The bytes of random tokens are rarely whole characters; the temperature keeps to the tokens
    that are.
    """
    tokenizer = load_tokenizer(gqa)
    prompts = [tuple(tokenizer.encode(text)) for text in ("the cat", "mat", "a hat and", "on the")]
    requests = [request(i, prompt) for i, prompt in enumerate(prompts)]
    free = run(native_engine(gqa), requests, greedy(24, temperature=1.0))
    tried = across = 0
    engine = native_engine(gqa)
    for it in requests:
        tokens = free[it.request_id].token_ids
        texts = [tokenizer.decode(tokens[:n]) for n in range(len(tokens) + 1)]
        for start in range(0, len(texts[-1]) - 1, 3):
            for size in (1, 2, 5):
                stop = texts[-1][start : start + size]
                if "\ufffd" in stop:
                    continue
                # A text that ends within a character decodes to U+FFFD there, never to part of it.
                expected = next(n for n, text in enumerate(texts) if stop in text)
                sampling = greedy(24, temperature=1.0, stop=(stop, "never in any text"))
                done = run(engine, [it], sampling)[it.request_id]
                assert done.token_ids == tokens[:expected], stop
                assert done.finish_reason == "stop" and stop in done.text
                assert done.text == texts[expected]
                tried += 1
                pieces = [tokenizer.decode([t]) for t in tokens[:expected]]
                across += not any(stop in piece for piece in pieces)
    assert tried > 30 and across > 10


def test_stop_strings_of_several_rows_are_matched_each_for_itself(gqa: Path):
    """Rows move when others leave; their text goes with them."""
    tokenizer = load_tokenizer(gqa)
    requests = [request(i, prompt) for i, prompt in enumerate(make_prompts(24, seed=9))]
    free = run(native_engine(gqa), requests, greedy(24, temperature=1.0))
    stops = tuple(
        stop
        for it in list(free.values())[:6]
        for stop in [tokenizer.decode(it.token_ids[4:8])[1:3]]
        if stop and "\ufffd" not in stop
    )
    sampling = greedy(24, temperature=1.0, stop=stops)
    assert stops
    for rows in (64, 5):
        done = run(native_engine(gqa, max_concurrent_sequences=rows), requests, sampling)
        for i, it in done.items():
            texts = [tokenizer.decode(free[i].token_ids[:n]) for n in range(25)]
            expected = next((n for n, t in enumerate(texts) if any(s in t for s in stops)), None)
            assert it.token_ids == free[i].token_ids[:expected]
            assert it.finish_reason == ("length" if expected is None else "stop")
        assert len({len(it.token_ids) for it in done.values()}) > 3


def test_half_a_stop_string_moves_with_its_row(gqa: Path):
    """Row 1 takes the place of row 0, which ends, between the two tokens of its stop string."""
    tokenizer = load_tokenizer(gqa)
    requests = [request(i, prompt) for i, prompt in enumerate(make_prompts(40, seed=12))]
    free = {
        i: it.token_ids
        for i, it in run(native_engine(gqa), requests, greedy(12, temperature=1.0)).items()
    }
    tried = 0
    for moving, tokens in free.items():
        for where in range(1, 11):
            pair = [tokenizer.decode([t]) for t in tokens[where : where + 2]]
            stop = pair[0][-1:] + pair[1][:1]
            if len(stop) < 2 or not stop.isascii() or stop in tokenizer.decode(tokens[: where + 1]):
                continue
            # Who ends at that very token, and whose last token does not end the moving one.
            leaving = next(
                i
                for i, other in free.items()
                if other.index(other[where]) == where
                and other[where] not in tokens[: where + 2]
                and stop not in tokenizer.decode(other[: where + 1])
            )
            sampling = greedy(
                12, temperature=1.0, stop=(stop,), stop_token_ids=(free[leaving][where],)
            )
            done = run(native_engine(gqa), [requests[leaving], requests[moving]], sampling)
            assert done[leaving].token_ids == free[leaving][: where + 1]
            assert done[moving].token_ids == tokens[: where + 2]
            tried += 1
    assert tried > 5


def test_a_stop_string_in_the_prompt_ends_nothing(gqa: Path):
    tokenizer = load_tokenizer(gqa)
    prompt = tuple(tokenizer.encode("the cat sat"))
    free = run(native_engine(gqa), [request(0, prompt)], greedy(6))[0]
    assert "cat" not in free.text
    assert run(native_engine(gqa), [request(0, prompt)], greedy(6, stop=("cat", "t")))[0] == free


def test_the_limits_count_tokens(gqa: Path):
    engine = native_engine(gqa, max_sequence_length=16)
    prompts = {0: (5,) * 3, 1: (6,) * 10, 2: (7,) * 15}
    done = run(engine, [request(i, p) for i, p in prompts.items()], greedy(8))
    assert {i: len(it.token_ids) for i, it in done.items()} == {0: 8, 1: 6, 2: 1}
    assert {it.finish_reason for it in done.values()} == {"length"}
    whole = run(native_engine(gqa), [request(1, prompts[1])], greedy(8))[1]
    assert done[1].token_ids == whole.token_ids[:6]


# ---- weights and memory --------------------------------------------------------------------------


@pytest.fixture
def nan_memory():
    """Memory that nobody has written holds NaN instead of whatever was there."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def test_unused_memory_does_not_leak(gqa: Path, nan_memory: None):
    """Attention gives unused positions weight 0, and 0 times NaN is NaN."""
    reference = reference_model(gqa)
    sampling = greedy(20, temperature=1.0)
    requests = [request(i, prompt) for i, prompt in enumerate(make_prompts(12, seed=10))]
    requests += [request(50 + i, (9,) * 60) for i in range(4)]
    sampling = replace(sampling, stop_token_ids=tuple(range(3, 60)))
    engine = native_engine(gqa, max_concurrent_sequences=32)
    engine.submit(requests[:3], sampling)
    done = {it.request_id: it.completion for it in engine.poll()}
    assert torch.isfinite(engine._decoder.cache).all()
    engine.submit(requests[3:], sampling)  # more rows, longer sequences
    done |= {it.request_id: it.completion for it in engine.poll()}
    assert torch.isfinite(engine._decoder.cache).all()
    done |= {i: it.completion for i, it in drain(engine).items()}
    for it in requests:
        assert_drawn_from_reference(reference, it, done[it.request_id], sampling)


def test_weights_that_were_not_finite_leave_nothing_in_the_cache(gqa: Path):
    """A diverged policy fills the cache with NaN; the next weights start from a clean one."""
    tensors = folder_tensors(gqa)
    engine, sampling = native_engine(gqa), greedy(12)
    requests = [request(i, prompt) for i, prompt in enumerate(make_prompts(6, seed=11))]
    expected = run(engine, requests, sampling)
    bad = {name: torch.full_like(tensor, math.nan) for name, tensor in tensors.items()}
    engine.load_weights(bad.items(), 1)
    broken = run(engine, [request(i, (5,) * 40) for i in range(20)], greedy(30))
    assert all(math.isnan(x) for it in broken.values() for x in it.logprobs)
    engine.load_weights(tensors.items(), 2)
    assert run(engine, requests, sampling) == expected


def test_new_weights_are_what_is_decoded(gqa: Path):
    tensors = folder_tensors(gqa)
    engine, requests = native_engine(gqa), [request(0, (5, 6, 7))]
    before = run(engine, requests, greedy(8))
    generator = torch.Generator().manual_seed(0)
    for name in tensors:
        changed = dict(tensors)
        noise = torch.randn(tensors[name].shape, generator=generator)
        changed[name] = tensors[name] + noise * tensors[name].std().clamp_min(0.1)
        engine.load_weights(changed.items(), 1)
        after = run(engine, requests, greedy(8))
        assert after[0].logprobs != before[0].logprobs, f"{name} has no effect"
    engine.load_weights(tensors.items(), 2)
    assert run(engine, requests, greedy(8)) == before


def test_a_failed_sync_says_which_tensor(gqa: Path):
    engine, tensors = native_engine(gqa), folder_tensors(gqa)
    items = list(tensors.items())
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(RuntimeError, match=r"1 tensors missing.*lm_head"):
        engine.load_weights(items[:-1], 1)
    with pytest.raises(RuntimeError, match=rf"'{name}' \[96, 64\] \(a second time\)"):
        engine.load_weights([*items, (name, tensors[name])], 1)
    with pytest.raises(RuntimeError, match=rf"'{name}' \[64, 96\].*expected shape \(96, 64\)"):
        engine.load_weights([(name, tensors[name].T)], 1)
    assert engine.policy_version is None


def test_sleep_frees_weights_and_cache(gqa: Path):
    engine = native_engine(gqa)
    run(engine, [request(0, (5, 6))], greedy(4))
    assert engine._decoder is not None and engine._rows is not None
    engine.sleep()
    assert engine._decoder is None and engine._rows is None
