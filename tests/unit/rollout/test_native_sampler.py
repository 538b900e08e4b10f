"""Keyed Gumbel noise, the support of top-p and top-k, and what is drawn with them.

The noise is a hash, so every statistic here is a fixed number: no test can fail by chance. The
bounds are those of independent draws: 4 standard errors, or what chi-square exceeds as rarely (some
200 comparisons are made). Not covered: the hash's quality beyond these statistics.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gdpo_megatron.rollout.base import noise_key
from gdpo_megatron.rollout.native.sampler import (
    KeyedNoise,
    filter_support,
    sample,
    split_keys,
)

CPU = torch.device("cpu")
NUM_IDS = 1000


def keys_of_run(number: int) -> Tensor:
    """Keys as a run makes them."""
    return split_keys([noise_key(1, "train", 0, i // 8, i % 8) for i in range(number)], CPU)


def keys_in_sequence(number: int) -> Tensor:
    """Keys that differ in few bits, the hard case for a hash."""
    return split_keys(list(range(number)), CPU)


def uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """What the noise is made from, float64 [n, V]: u with -log(-log(u)) = noise."""
    return (-(-KeyedNoise(NUM_IDS, CPU).gumbel(keys, positions).double()).exp()).exp()


def fixed_position(keys: Tensor) -> Tensor:
    return uniforms(keys, torch.full((len(keys),), 3))


def along_positions(keys: Tensor) -> Tensor:
    """One completion's positions instead of one position of many completions."""
    return uniforms(keys[:1].expand(len(keys), 2), torch.arange(len(keys)))


STREAMS = {
    "keys of a run": lambda: fixed_position(keys_of_run(400)),
    "keys in sequence": lambda: fixed_position(keys_in_sequence(400)),
    "keys 2^32 apart": lambda: fixed_position(split_keys([i << 32 for i in range(400)], CPU)),
    "positions": lambda: along_positions(keys_of_run(400)),
    "positions of key 0": lambda: along_positions(keys_in_sequence(400)),
}


@pytest.fixture(scope="module", params=list(STREAMS))
def stream(request: pytest.FixtureRequest) -> Tensor:
    """Uniforms [400, 1000]: rows are keys or positions, columns token ids."""
    return STREAMS[request.param]()


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def chi_square(counts: Tensor, expected: Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def chi_square_bound(degrees: int, z: float = 4.0) -> float:
    """What is exceeded as rarely as z standard errors by a normal draw (Wilson-Hilferty)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + z * math.sqrt(spread)) ** 3


def test_the_chi_square_bound_is_that_of_the_tables():
    """The 99.9 % points."""
    for degrees, tabulated in ((7, 24.322), (63, 103.442), (255, 330.519)):
        assert chi_square_bound(degrees, z=3.0902) == pytest.approx(tabulated, rel=1e-2)


# ---- noise ---------------------------------------------------------------------------------------


def test_noise_has_the_moments_of_a_gumbel(stream: Tensor):
    noise = -(-stream.log()).log()
    n = noise.numel()
    variance = math.pi**2 / 6
    assert float(noise.mean()) == pytest.approx(0.5772157, abs=4 * math.sqrt(variance / n))
    # The fourth central moment of a Gumbel is 5.4 + 3 times its variance squared (kurtosis 5.4).
    assert float(noise.var()) == pytest.approx(variance, abs=4 * variance * math.sqrt(4.4 / n))


def test_uniforms_fill_the_unit_interval_evenly(stream: Tensor):
    """Kolmogorov-Smirnov over all (1.95: its 99.9 % point), and 256 bins."""
    ordered = stream.flatten().sort().values
    n = len(ordered)
    gap = (ordered - (torch.arange(n, dtype=torch.float64) + 0.5) / n).abs().max()
    assert float(gap) < 1.95 / math.sqrt(n)
    counts = torch.bincount((stream.flatten() * 256).long(), minlength=256).double()
    assert chi_square(counts, torch.full((256,), n / 256)) < chi_square_bound(255)
    assert 0 < float(ordered[0]) and float(ordered[-1]) < 1


@pytest.mark.parametrize("distance", [1, 2, 8, 64])
def test_neighbours_are_independent(stream: Tensor, distance: int):
    """Across keys or positions, and across token ids: correlation, and the joint 8 x 8 bins."""
    pairs = {
        "rows": (stream[:-distance], stream[distance:]),
        "ids": (stream[:, :-distance], stream[:, distance:]),
        "both": (stream[:-distance, :-distance], stream[distance:, distance:]),
    }
    for name, (a, b) in pairs.items():
        n = a.numel()
        assert abs(correlation(a, b)) < 4 / math.sqrt(n), name
        # The tails decide who wins, so they are looked at by themselves.
        high_a, high_b = (a > 0.95).double(), (b > 0.95).double()
        assert abs(correlation(high_a, high_b)) < 4 / math.sqrt(n), name
        cells = (a * 8).long() * 8 + (b * 8).long()
        counts = torch.bincount(cells.flatten(), minlength=64).double()
        assert chi_square(counts, torch.full((64,), n / 64)) < chi_square_bound(63), name


def test_rows_and_columns_have_no_level_of_their_own(stream: Tensor):
    """A key, position or id whose noise is high as a whole would be favoured always."""
    for dim, number in ((0, stream.shape[0]), (1, stream.shape[1])):
        deviations = (stream.mean(dim) - 0.5) / math.sqrt(1 / 12 / number)
        count = len(deviations)
        assert float(deviations.abs().max()) < 5
        # The sum of their squares is chi-square with `count` degrees.
        assert float((deviations**2).sum()) < chi_square_bound(count)
        assert float((deviations**2).sum()) > 2 * count - chi_square_bound(count)


def test_each_bit_of_key_and_position_matters():
    base = noise_key(1, "train", 5, 6, 7)
    noise = KeyedNoise(NUM_IDS, CPU)
    flipped = split_keys([base, *(base ^ (1 << bit) for bit in range(64))], CPU)
    u = uniforms(flipped, torch.full((65,), 3))
    bound = 4.5 / math.sqrt(NUM_IDS)
    assert max(abs(correlation(u[0], row)) for row in u[1:]) < bound
    positions = torch.tensor([0, *(1 << bit for bit in range(16))])
    u = uniforms(flipped[:1].expand(17, 2), positions)
    assert max(abs(correlation(u[0], row)) for row in u[1:]) < bound
    first = noise.gumbel(flipped, torch.zeros(65, dtype=torch.int64))
    assert len(set(map(tuple, first.tolist()))) == 65


def test_noise_belongs_to_the_completion_and_not_to_its_place():
    keys, positions = keys_of_run(20), torch.arange(20) % 5
    noise = KeyedNoise(NUM_IDS, CPU)
    whole = noise.gumbel(keys, positions)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(noise.gumbel(keys[order], positions[order]), whole[order])
    assert torch.equal(noise.gumbel(keys[7:8], positions[7:8]), whole[7:8])
    assert torch.equal(noise.gumbel(keys, positions.int()), whole)
    # A smaller vocabulary sees the same noise for the tokens that it has.
    assert torch.equal(KeyedNoise(10, CPU).gumbel(keys, positions), whole[:, :10])
    assert torch.isfinite(whole).all()


def test_noise_keys_name_seed_stream_step_prompt_and_sample():
    base = (1, "train", 2, 3, 4)
    others = [(2, "train", 2, 3, 4), (1, "eval", 2, 3, 4), (1, "train", 3, 3, 4)]
    others += [(1, "train", 2, 4, 4), (1, "train", 2, 3, 5), (1, "train", 23, 4, 0)]
    keys = [noise_key(*it) for it in (base, *others)]
    assert len(set(keys)) == len(keys) and all(0 <= key < 1 << 64 for key in keys)
    # The same key must give the same noise in every process: pinned, against salted hashes.
    assert noise_key(1234, "train", 0, 0, 0) == 10165603028451988901


def test_split_keys_is_the_reference_splitmix64():
    """First outputs of splitmix64 with seed 0 (Steele, Lea and Flood; as in the JDK)."""
    high, low = split_keys([0], CPU)[0].tolist()
    assert (high & 0xFFFFFFFF, low & 0xFFFFFFFF) == (0xE220A839, 0x7B1DCDAF)
    high, low = split_keys([0x9E3779B97F4A7C15], CPU)[0].tolist()
    assert (high & 0xFFFFFFFF, low & 0xFFFFFFFF) == (0x6E789E6A, 0xA1B965F4)
    assert split_keys([], CPU).shape == (0, 2)
    assert split_keys([(1 << 64) - 1, 0], CPU).dtype == torch.int32


# ---- support -------------------------------------------------------------------------------------

# Probabilities 0.5, 0.25, 0.125, 0.0625, 0.0625, shuffled by the order below.
LOGITS = torch.tensor([0.125, 0.5, 0.0625, 0.25, 0.0625]).log()


def kept(top_p: float = 1.0, top_k: int = 0, logits: Tensor = LOGITS) -> list[int]:
    filtered = filter_support(logits[None].clone(), top_p, top_k)[0]
    support = [i for i, value in enumerate(filtered.tolist()) if value > -math.inf]
    assert all(filtered[i] == logits[i] for i in support)
    return support


def test_top_k_keeps_the_k_most_likely():
    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=1) == [1]
    assert kept(top_k=2) == [1, 3]
    assert kept(top_k=3) == [0, 1, 3]
    assert kept(top_k=99) == [0, 1, 2, 3, 4]


def test_top_p_keeps_the_fewest_that_reach_it():
    assert kept(top_p=0.0) == [1]
    assert kept(top_p=0.4) == [1]
    assert kept(top_p=0.6) == [1, 3]
    assert kept(top_p=0.8) == [0, 1, 3]
    # Of the two equal ones only one is needed.
    assert len(kept(top_p=0.9)) == 4
    assert kept(top_p=0.99) == [0, 1, 2, 3, 4]


def test_top_p_looks_at_what_top_k_left():
    """Of the top 3, renormalised, 4/7 + 2/7 = 0.857: enough for 0.8, not for 0.86."""
    assert kept(top_p=0.8, top_k=3) == [1, 3]
    assert kept(top_p=0.86, top_k=3) == [0, 1, 3]


def test_rows_are_filtered_each_for_itself():
    two = torch.stack([LOGITS, LOGITS.flip(0)])
    filtered = filter_support(two.clone(), 0.6, 0)
    assert torch.equal(filtered[1], filtered[0].flip(0))


# ---- draws ---------------------------------------------------------------------------------------


def draw(logits: Tensor, keys: Tensor, **options: float) -> tuple[Tensor, Tensor]:
    noise = KeyedNoise(logits.shape[-1], CPU)
    settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} | options
    positions = torch.zeros(len(keys), dtype=torch.int64)
    return sample(logits.expand(len(keys), -1), noise, keys, positions, **settings)


PEAKED = torch.tensor([4.0, 3.0, 2.5, 0.0, -1.0, 1.0, 2.0, 3.5])


@pytest.mark.parametrize("keys_of", [keys_of_run, keys_in_sequence])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_frequencies_are_those_of_the_softmax(keys_of, temperature: float):
    n = 40_000
    tokens, logprobs = draw(PEAKED, keys_of(n), temperature=temperature)
    probabilities = (PEAKED.double() / temperature).softmax(-1)
    counts = torch.bincount(tokens, minlength=8).double()
    assert chi_square(counts, n * probabilities) < chi_square_bound(7)
    torch.testing.assert_close(logprobs.double(), probabilities.log()[tokens], rtol=0, atol=1e-6)


def test_frequencies_over_a_support_are_renormalised():
    n = 40_000
    tokens, logprobs = draw(PEAKED, keys_of_run(n), temperature=0.7, top_k=5, top_p=0.9)
    # exp(logits / 0.7) in order: 303.6, 148.4, 72.7, 35.6, 17.4; 0.9 of their sum is 520.0.
    support = torch.tensor([0, 7, 1])
    assert set(tokens.tolist()) == set(support.tolist())
    probabilities = torch.zeros(8, dtype=torch.float64)
    probabilities[support] = (PEAKED[support].double() / 0.7).softmax(-1)
    counts = torch.bincount(tokens, minlength=8).double()
    assert chi_square(counts[support], n * probabilities[support]) < chi_square_bound(2)
    torch.testing.assert_close(logprobs.double(), probabilities.log()[tokens], rtol=0, atol=1e-6)


def test_greedy_takes_the_most_likely_and_reports_temperature_one():
    tokens, logprobs = draw(PEAKED, keys_of_run(3), temperature=0.0)
    assert tokens.tolist() == [0, 0, 0]
    expected = float(PEAKED.double().log_softmax(-1)[0])
    assert logprobs.tolist() == pytest.approx([expected] * 3, abs=1e-6)


def test_a_vocabulary_of_one_and_a_support_of_one_are_certain():
    for logits, options in ((torch.tensor([2.0]), {}), (PEAKED, {"top_k": 1})):
        tokens, logprobs = draw(logits, keys_of_run(5), **options)
        assert tokens.tolist() == [0] * 5 and logprobs.tolist() == [0.0] * 5


def test_the_callers_logits_stay_as_they_are():
    logits = PEAKED[None].clone()
    draw(logits, keys_of_run(1), top_k=2, top_p=0.5)
    assert torch.equal(logits[0], PEAKED)


def test_noise_is_finite_also_where_all_its_bits_are_set():
    """Infinite, it would draw its token whatever the logits: once in 2^24 numbers."""
    # Where it happens with this key: found by looking through 2^24 numbers.
    position, token = 235, 54776
    drawn = KeyedNoise(2**16, CPU).gumbel(split_keys([5], CPU), torch.tensor([position]))
    assert torch.isfinite(drawn).all()
    assert int(drawn.argmax()) == token
    assert float(drawn.max()) == pytest.approx(-math.log(-math.log1p(-(2.0**-24))), rel=1e-6)
