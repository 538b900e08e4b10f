"""What must hold for every batch. Not covered here: published numbers (test_presets.py)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gdpo_megatron.algorithms import compute_advantages
from gdpo_megatron.config.advantage import PRESETS, AdvantageConfig
from gdpo_megatron.types import RewardMatrix

from .helpers import matrix, permuted, reward_matrices, slow_gdpo_combined

ESTIMATORS = ("gdpo", "grpo", "grpo_no_std", "gd2po")
configs = st.builds(
    AdvantageConfig,
    estimator=st.sampled_from(ESTIMATORS),
    baseline=st.sampled_from(["mean", "leave_one_out"]),
    missing=st.sampled_from(["exclude", "zero"]),
    unscored_row=st.sampled_from(["exclude", "count"]),
    small_group=st.sampled_from(["zero", "raw"]),
    batch_norm=st.sampled_from(["sequence", "token", "none"]),
    batch_eps_mode=st.sampled_from(["std_plus", "var_rsqrt"]),
)


def tokens_of(rewards: RewardMatrix) -> torch.Tensor:
    return torch.arange(len(rewards.group_ids)) * 13 % 7 + 1


@settings(max_examples=60)
@given(reward_matrices(), configs, st.integers(1, 4), st.randoms(use_true_random=False))
def test_shards_in_any_arrangement_give_the_same_bits(rewards, config, num_ranks, random):
    """Rows dealt to ranks, gathered by sample id: not one bit depends on who had which row."""
    tokens = tokens_of(rewards)
    whole = compute_advantages(rewards, config, tokens)
    owner = torch.tensor([random.randrange(num_ranks) for _ in rewards.group_ids])
    sample_ids = torch.cat([(owner == rank).nonzero()[:, 0] for rank in range(num_ranks)])
    gathered = permuted(rewards, sample_ids)
    again = compute_advantages(permuted(gathered, sample_ids.argsort()), config, tokens)
    assert torch.equal(whole.advantages, again.advantages)
    assert torch.equal(whole.per_reward, again.per_reward)


@settings(max_examples=60)
@given(reward_matrices(), configs, st.randoms(use_true_random=False))
def test_interleaving_groups_changes_no_bit(rewards, config, random):
    """As long as the order inside each group stays, sums are formed in the same order."""
    by_group = rewards.group_ids.argsort(stable=True)
    keys = list(range(len(by_group)))
    slots = sorted(keys, key=lambda _: random.random())
    # Deal the slots to groups at random, then fill each group's slots in its own order.
    order = torch.empty(len(keys), dtype=torch.long)
    for group in rewards.group_ids.unique():
        rows = (rewards.group_ids == group).nonzero()[:, 0]
        mine, slots = sorted(slots[: len(rows)]), slots[len(rows) :]
        order[torch.tensor(mine, dtype=torch.long)] = rows
    tokens = tokens_of(rewards)
    plain = compute_advantages(rewards, config, tokens)
    mixed = compute_advantages(permuted(rewards, order), config, tokens[order])
    assert torch.equal(plain.advantages[order], mixed.advantages)


@settings(max_examples=60)
@given(reward_matrices(), configs, st.randoms(use_true_random=False))
def test_row_order_does_not_matter(rewards, config, random):
    order = torch.tensor(random.sample(range(len(rewards.group_ids)), len(rewards.group_ids)))
    tokens = tokens_of(rewards)
    plain = compute_advantages(rewards, config, tokens)
    mixed = compute_advantages(permuted(rewards, order), config, tokens[order])
    torch.testing.assert_close(plain.advantages[order], mixed.advantages, rtol=1e-12, atol=1e-12)
    assert torch.equal(plain.loss_rows[order], mixed.loss_rows)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_row_order_and_threads_on_a_large_batch(estimator):
    """Batches long enough for vectorised and threaded kernels; K odd, groups of uneven sizes."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(20_011, 5, generator=generator, dtype=torch.float64) * 7 - 3
    group_ids = torch.randint(0, 1500, (20_011,), generator=generator).sort().values
    rewards = matrix(values, group_ids)
    config = AdvantageConfig(estimator=estimator)
    plain = compute_advantages(rewards, config)
    order = torch.randperm(20_011, generator=generator)
    mixed = compute_advantages(permuted(rewards, order), config)
    torch.testing.assert_close(plain.advantages[order], mixed.advantages, rtol=1e-12, atol=1e-12)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        threaded = compute_advantages(rewards, config)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(plain.advantages, threaded.advantages)
    # A part made of whole groups gives its groups' bits: nothing depends on a row's position.
    cut = int((group_ids < 733).sum())
    part = matrix(values[cut:], group_ids[cut:])
    alone = compute_advantages(part, AdvantageConfig(estimator=estimator, batch_norm="none"))
    together = compute_advantages(rewards, AdvantageConfig(estimator=estimator, batch_norm="none"))
    assert torch.equal(together.combined[cut:], alone.combined)


@settings(max_examples=60)
@given(reward_matrices())
def test_gdpo_is_the_formula(rewards):
    weights = [0.5, 2.0, 1.0, -1.0][: len(rewards.names)]
    config = AdvantageConfig(weights=dict(zip(rewards.names, weights, strict=True)))
    ours = compute_advantages(rewards, config).combined
    slow = torch.tensor(slow_gdpo_combined(rewards, weights, 1e-6), dtype=torch.float64)
    torch.testing.assert_close(ours, slow, rtol=1e-9, atol=1e-9)


@settings(max_examples=60)
@given(
    reward_matrices(),
    st.sampled_from([0.01, 0.5, 3.0, 1000.0]),
    st.sampled_from([-1e4, -3.0, 0.0, 0.1]),
    st.sampled_from([1.0, 0.25, 40.0]),
)
def test_affine_change_of_one_reward_and_common_weight_change_nothing(rewards, a, b, c):
    """With eps 0; a reward on [-3, 3] counts like one on {0, 1}."""
    config = AdvantageConfig(group_eps=0.0, batch_eps=0.0)
    scaled_values = rewards.values.double().clone()
    scaled_values[:, 0] = a * scaled_values[:, 0] + b
    # A spread that the shift rounds away is lost before it gets here.
    spread = rewards.values.double().nan_to_num()[:, 0].unique().diff()
    assume(bool((spread > 1e-3).all()))
    scaled = RewardMatrix(rewards.names, scaled_values, rewards.valid, rewards.group_ids)
    weighted = AdvantageConfig(
        group_eps=0.0, batch_eps=0.0, weights=dict.fromkeys(rewards.names, c)
    )
    plain = compute_advantages(rewards, config).advantages
    other = compute_advantages(scaled, weighted).advantages
    torch.testing.assert_close(plain, other, rtol=1e-6, atol=1e-6)


@settings(max_examples=60)
@given(reward_matrices(missing=True), st.sampled_from(["gdpo", "grpo", "grpo_no_std"]))
def test_each_group_sums_to_zero_before_the_batch_norm(rewards, estimator):
    batch = compute_advantages(rewards, AdvantageConfig(estimator=estimator, batch_norm="none"))
    for group in rewards.group_ids.unique():
        rows = rewards.group_ids == group
        scale = 1.0 + float(batch.combined[rows].abs().sum())
        assert abs(float(batch.combined[rows].sum())) < 1e-12 * scale
        assert float(batch.per_reward[rows].sum(0).abs().max()) < 1e-12 * (
            1.0 + float(batch.per_reward[rows].abs().sum())
        )


@settings(max_examples=60)
@given(reward_matrices())
def test_sequence_batch_norm_flips_no_sign_and_wakes_no_dead_group(rewards):
    batch = compute_advantages(rewards, AdvantageConfig())
    assert torch.equal(batch.advantages.sign(), batch.combined.sign())


@settings(max_examples=60)
@given(reward_matrices(), st.sampled_from(ESTIMATORS))
def test_a_missing_entry_never_makes_anything_non_finite(rewards, estimator):
    batch = compute_advantages(rewards, AdvantageConfig(estimator=estimator))
    for result in (batch.advantages, batch.per_reward, batch.combined):
        assert bool(torch.isfinite(result).all())
    assert bool((batch.per_reward[~rewards.valid] == 0).all())
    unscored = ~rewards.valid.any(1)
    assert bool((batch.advantages[unscored] == 0).all())
    assert not bool(batch.loss_rows[unscored].any())
    assert all(torch.isfinite(torch.tensor(list(batch.stats.values()))))


@settings(max_examples=60)
@given(reward_matrices(), st.sampled_from(ESTIMATORS))
def test_unscored_rows_leave_the_others_alone(rewards, estimator):
    """Adding rows without any score changes no bit of the others."""
    config = AdvantageConfig(estimator=estimator)
    plain = compute_advantages(rewards, config)
    extra = RewardMatrix(
        rewards.names,
        torch.cat([rewards.values, torch.full((2, len(rewards.names)), torch.nan)]),
        torch.cat([rewards.valid, torch.zeros(2, len(rewards.names), dtype=torch.bool)]),
        torch.cat([rewards.group_ids, rewards.group_ids[:1], torch.tensor([99])]),
    )
    more = compute_advantages(extra, config)
    torch.testing.assert_close(more.advantages[:-2], plain.advantages, rtol=1e-12, atol=1e-12)
    assert more.advantages[-2:].tolist() == [0.0, 0.0]


@settings(max_examples=60)
@given(reward_matrices(missing=False), st.sampled_from(sorted(PRESETS)))
def test_constant_groups_are_exactly_zero_in_every_preset(rewards, preset):
    """Constant at any value, 0.1 and 0.7 in float32 included, the group stage is 0.0."""
    constant = rewards.values[:1].expand_as(rewards.values)
    sizes = torch.bincount(rewards.group_ids + 3)
    alone = (sizes[rewards.group_ids + 3] == 1)[:, None]
    batch = compute_advantages(
        RewardMatrix(rewards.names, constant, rewards.valid, rewards.group_ids),
        AdvantageConfig.from_preset(preset),
        tokens_of(rewards),
    )
    assert bool((torch.where(alone, 0.0, batch.per_reward) == 0).all())


@pytest.mark.parametrize("value", [0.1, 0.7, 1e-8, -3.3, 1e8])
@pytest.mark.parametrize("size", [2, 3, 7, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_constant_group_is_exactly_zero(value, size, dtype, estimator):
    value = min(value, 6e4) if dtype == torch.float16 else value
    rewards = matrix([[value, 0.7]] * size, [0] * size, dtype=dtype)
    config = AdvantageConfig(estimator=estimator, group_eps=0.0, batch_eps=0.0)
    batch = compute_advantages(rewards, config)
    assert batch.advantages.tolist() == [0.0] * size
    assert batch.per_reward.abs().sum() == 0


def test_rewards_that_cancel_give_exactly_zero():
    """K=2 with a constant sum; three terms that add up in different orders for GRPO."""
    two = matrix([[0.1, 0.7], [0.7, 0.1], [0.3, 0.5]], [0, 0, 0])
    three = matrix([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.2, 0.1, 0.3]], [0, 0, 0])
    bare = {"group_eps": 0.0, "batch_eps": 0.0}
    for estimator in ("gdpo", "grpo", "grpo_no_std"):
        config = AdvantageConfig(estimator=estimator, **bare)
        assert compute_advantages(two, config).advantages.tolist() == [0.0] * 3
    for estimator in ("grpo", "grpo_no_std"):
        config = AdvantageConfig(estimator=estimator, **bare)
        assert compute_advantages(three, config).advantages.tolist() == [0.0] * 3
    # GDPO keeps what GRPO loses here: the spreads of the three differ.
    assert compute_advantages(three, AdvantageConfig(**bare)).advantages.abs().max() > 0.5


def test_one_reward_is_grpo_followed_by_the_batch_stage():
    rewards = matrix([1.0, 0.0, 0.0, 1.0, 1.0, 0.0], [0, 0, 0, 1, 1, 1])
    gdpo = compute_advantages(rewards, AdvantageConfig())
    grpo = compute_advantages(rewards, AdvantageConfig(estimator="grpo", batch_norm="sequence"))
    assert torch.equal(gdpo.advantages, grpo.advantages)
    plain = compute_advantages(rewards, AdvantageConfig(estimator="grpo"))
    torch.testing.assert_close(gdpo.combined, plain.advantages)


@settings(max_examples=60)
@given(
    reward_matrices(max_rewards=1),
    st.sampled_from(["mean", "leave_one_out"]),
    st.sampled_from(["all", "others"]),
    st.sampled_from(["zero", "raw"]),
    st.sampled_from([0, 1]),
    st.sampled_from(["max_equals_min", "std_positive"]),
)
def test_with_one_reward_the_group_stages_are_the_same(
    rewards, baseline, group_std, small_group, ddof, constant_test
):
    keys = {
        "baseline": baseline,
        "group_std": group_std,
        "group_eps_mode": "positive_only",
        "small_group": small_group,
        "group_ddof": ddof,
        "constant_test": constant_test,
        "batch_norm": "none",
    }
    gdpo = compute_advantages(rewards, AdvantageConfig(**keys)).advantages
    grpo = compute_advantages(rewards, AdvantageConfig(estimator="grpo", **keys)).advantages
    torch.testing.assert_close(gdpo, grpo, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_empty_batch(estimator):
    rewards = matrix(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    batch = compute_advantages(rewards, AdvantageConfig(estimator=estimator), torch.zeros(0))
    assert batch.advantages.shape == (0,)
    assert batch.per_reward.shape == (0, 3)


@pytest.mark.parametrize(("group_size", "lone"), [(4, 1.5), (16, 3.75)])
def test_one_live_group_of_32(group_size, lone):
    """A lone success: (G-1)/sqrt(G), over std_B = sqrt(m (G-1) / (N G - 1)) with m=1, N=32."""
    values = torch.zeros(32 * group_size)
    values[0] = 1.0
    rewards = matrix(values, torch.arange(32 * group_size) // group_size)
    batch = compute_advantages(rewards, AdvantageConfig(group_eps=0.0, batch_eps=0.0))
    std_b = ((group_size - 1) / (32 * group_size - 1)) ** 0.5
    assert batch.combined[0].item() == pytest.approx(lone, rel=1e-12)
    assert batch.stats["batch_std"] == pytest.approx(std_b, rel=1e-12)
    assert batch.advantages[0].item() == pytest.approx(lone / std_b, rel=1e-12)
    assert bool((batch.advantages[group_size:] == 0).all())
    if group_size == 16:
        assert batch.advantages[0].item() == pytest.approx(21.9, abs=0.05)


def test_scoring_twice_gives_the_same_bits_and_leaves_the_input_alone():
    values = torch.rand(64, 3, generator=torch.Generator().manual_seed(1))
    valid = torch.rand(64, 3, generator=torch.Generator().manual_seed(2)) > 0.2
    rewards = matrix(values.clone(), torch.arange(64) % 8, valid)
    first = compute_advantages(rewards, AdvantageConfig())
    second = compute_advantages(rewards, AdvantageConfig())
    assert torch.equal(first.advantages, second.advantages)
    assert torch.equal(rewards.values.double(), values.double())
