"""Every key of the `advantage` section acts, and bad input is answered with one clear line."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from gdpo_megatron.algorithms import (
    ESTIMATORS,
    Estimate,
    GroupedRewards,
    compute_advantages,
    resolve_estimator,
)
from gdpo_megatron.config.advantage import PRESETS, AdvantageConfig
from gdpo_megatron.errors import InputError
from gdpo_megatron.types import AdvantageBatch, RewardMatrix

from .helpers import matrix

NAN = math.nan
BARE = {"group_eps": 0.0, "batch_norm": "none"}


def combined(values, group_ids, valid=None, **keys):
    config = AdvantageConfig(**{**BARE, **keys})
    return compute_advantages(matrix(values, group_ids, valid), config).advantages.tolist()


def test_defaults_are_the_paper():
    config = AdvantageConfig()
    assert (config.estimator, config.group_ddof, config.group_eps) == ("gdpo", 1, 1e-6)
    assert (config.batch_norm, config.batch_ddof, config.batch_eps) == ("sequence", 1, 1e-6)
    assert (config.group_eps_mode, config.batch_eps_mode) == ("std_plus", "std_plus")
    assert (config.constant_test, config.constant_atol) == ("max_equals_min", 0.0)
    assert (config.baseline, config.missing, config.small_group) == ("mean", "exclude", "zero")
    assert (config.unscored_row, config.batch_std_floor, config.advantage_cap) == (
        "exclude",
        None,
        None,
    )
    assert config == AdvantageConfig.from_preset("paper")


def test_presets_name_existing_keys_and_given_keys_win():
    names = {field.name for field in fields(AdvantageConfig)}
    for name, preset in PRESETS.items():
        assert set(preset) <= names
        config = AdvantageConfig.from_preset(name, weights={"a": 1.0})
        assert config.preset == name
        assert all(getattr(config, key) == value for key, value in preset.items())
    assert AdvantageConfig(preset="trl", group_eps=0.5).group_eps == 0.5
    assert AdvantageConfig.from_preset("trl", batch_eps=0.5).group_eps == 1e-4


def test_grpo_has_no_batch_stage_unless_asked():
    assert AdvantageConfig(estimator="grpo").batch_norm == "none"
    assert AdvantageConfig(estimator="grpo_no_std", preset="verl").batch_norm == "none"
    assert AdvantageConfig(estimator="grpo_no_std", batch_norm="token").batch_norm == "token"
    assert AdvantageConfig(estimator="./mine.py:f").batch_norm == "sequence"


def test_grpo_formulas():
    """R = (3, 1, 0, 0): mean 1, deviations 2, 0, -1, -1, std sqrt(6 / 3)."""
    values, ids = [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]], [0] * 4
    weights = {"correct": 1.0, "format": 2.0}
    s = math.sqrt(2)
    assert combined(values, ids, estimator="grpo", weights=weights) == pytest.approx(
        [2 / s, 0, -1 / s, -1 / s]
    )
    assert combined(values, ids, estimator="grpo_no_std", weights=weights) == pytest.approx(
        [2, 0, -1, -1]
    )


def test_per_reward_adds_up_for_every_estimator():
    values = torch.rand(12, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    valid = torch.rand(12, 3, generator=torch.Generator().manual_seed(4)) > 0.2
    weights = {"correct": 1.0, "format": -2.0, "length": 0.25}
    for estimator in ("gdpo", "grpo", "grpo_no_std"):
        for baseline in ("mean", "leave_one_out"):
            config = AdvantageConfig(estimator=estimator, baseline=baseline, weights=weights)
            batch = compute_advantages(matrix(values, torch.arange(12) % 3, valid), config)
            total = batch.per_reward @ torch.tensor([1.0, -2.0, 0.25], dtype=torch.float64)
            torch.testing.assert_close(batch.combined, total, rtol=1e-12, atol=1e-12)


def test_a_missing_reward_neither_helps_nor_hurts_under_grpo():
    """Row 1 lacks the second reward: R counts its group mean 1 there, so 1 + 1, 0 + 1, 0 + 1."""
    values = [[1.0, 1.0], [0.0, NAN], [0.0, 1.0]]
    valid = [[True, True], [True, False], [True, True]]
    assert combined(values, [0] * 3, valid, estimator="grpo_no_std") == pytest.approx(
        [2 / 3, -1 / 3, -1 / 3]
    )


@pytest.mark.parametrize("estimator", ["gdpo", "grpo"])
def test_group_ddof(estimator):
    """Deviations +-0.5: std sqrt(1/3) with ddof 1, 0.5 with ddof 0."""
    values = [1.0, 1.0, 0.0, 0.0]
    one = combined(values, [0] * 4, estimator=estimator, group_ddof=1)
    zero = combined(values, [0] * 4, estimator=estimator, group_ddof=0)
    assert one[0] == pytest.approx(0.5 / math.sqrt(1 / 3))
    assert zero[0] == pytest.approx(1.0)


def test_group_eps_is_added_to_the_std():
    assert combined([1.0, 0.0], [0, 0], group_eps=0.5)[0] == pytest.approx(0.5 / (0.5**0.5 + 0.5))


def test_leave_one_out_and_std_of_others():
    """(1, 0, 0, 0): over all, std 0.5; the others of the success are constant, of a 0: std 1/sqrt3.

    Deviations from the others' means are 1 and -1/3.
    """
    values, ids = [1.0, 0.0, 0.0, 0.0], [0] * 4
    own = {"baseline": "leave_one_out", "estimator": "gdpo"}
    assert combined(values, ids, **own) == pytest.approx([2.0] + [-2 / 3] * 3)
    others = combined(values, ids, **own, group_std="others", group_eps_mode="positive_only")
    assert others == pytest.approx([1.0] + [-math.sqrt(3) / 3] * 3)
    raw = combined(values, ids, baseline="leave_one_out", estimator="grpo_no_std")
    assert raw == pytest.approx([1.0] + [-1 / 3] * 3)


@pytest.mark.parametrize("estimator", ["gdpo", "grpo", "grpo_no_std"])
def test_constant_atol(estimator):
    values, ids = [0.5, 0.5 + 1e-5, 0.5, 0.5], [0] * 4
    assert max(combined(values, ids, estimator=estimator)) > 0
    quiet = combined(values, ids, estimator=estimator, constant_atol=1e-4)
    assert quiet == [0.0] * 4


@pytest.mark.parametrize("estimator", ["gdpo", "grpo"])
def test_std_positive_calls_rounding_constant_where_max_equals_min_does_not(estimator):
    values, ids = [0.1 + 0.2, 0.3, 0.3, 0.3], [0] * 4
    assert combined(values, ids, estimator=estimator)[0] == pytest.approx(1.5)
    quiet = combined(values, ids, estimator=estimator, constant_test="std_positive")
    assert quiet == [0.0] * 4


@pytest.mark.parametrize(
    ("estimator", "divisor"), [("gdpo", 1.5), ("grpo", 1.5), ("grpo_no_std", 1)]
)
def test_small_group(estimator, divisor):
    values, ids = [[3.0, 1.0], [1.0, 0.0], [0.0, 0.0]], [5, 9, 9]
    zero = combined(values, ids, estimator=estimator, group_eps=0.5)
    raw = combined(values, ids, estimator=estimator, group_eps=0.5, small_group="raw")
    assert zero[0] == 0.0
    assert raw[0] == pytest.approx(4.0 / divisor)
    assert raw[1:] == zero[1:]


def test_small_group_counts_valid_entries():
    valid = [[True], [False], [False]]
    assert combined([[2.0], [NAN], [NAN]], [0] * 3, valid) == [0.0, 0.0, 0.0]
    assert combined([[2.0], [NAN], [NAN]], [0] * 3, valid, small_group="raw") == [2.0, 0.0, 0.0]


def test_missing_and_unscored_row():
    """(1, -, 0 | -, -): excluded, the group is (1, 0); as zeros it is (1, 0, 0)."""
    values, ids = [[1.0, 5.0], [NAN, 5.0], [0.0, 5.0], [NAN, NAN]], [0] * 4
    valid = ~torch.tensor(values).isnan()
    h = math.sqrt(0.5)
    assert combined(values, ids, valid) == pytest.approx([h, 0, -h, 0])
    s = math.sqrt(1 / 3)
    zero = combined(values, ids, valid, missing="zero")
    assert zero == pytest.approx([2 / 3 / s, -1 / 3 / s, -1 / 3 / s, 0])
    all_zero = combined(values, ids, valid, missing="zero", unscored_row="count")
    # Now the second reward varies as well: (5, 5, 5, 0), std 2.5.
    assert all_zero == pytest.approx([0.75 / 0.5 + 0.5] + [-0.5 + 0.5] * 2 + [-0.5 - 1.5])
    with pytest.raises(InputError, match="row 1 has no reward 'correct'"):
        combined(values, ids, valid, missing="error")


def test_unscored_row_counts_in_the_batch_statistics_if_asked():
    """Sums (1, -1) / sqrt 2 with one row more at 0: std 1 over two rows, sqrt(1/2) over three."""
    rewards = matrix([[1.0], [0.0], [NAN]], [0] * 3, [[True], [True], [False]])
    out = compute_advantages(rewards, AdvantageConfig(group_eps=0.0, batch_eps=0.0))
    counted = AdvantageConfig(group_eps=0.0, batch_eps=0.0, unscored_row="count")
    more = compute_advantages(rewards, counted)
    h = math.sqrt(0.5)
    assert out.stats["batch_std"] == pytest.approx(1.0)
    assert out.advantages.tolist() == pytest.approx([h, -h, 0.0])
    assert out.loss_rows.tolist() == [True, True, False]
    assert more.stats["batch_std"] == pytest.approx(h)
    assert more.advantages.tolist() == pytest.approx([1.0, -1.0, 0.0])
    assert more.loss_rows.tolist() == [True, True, True]


def test_batch_stage_keys():
    """One group (1, 1, 0, 0): sums +-0.866, std_B 1 with ddof 1, 0.866 with ddof 0."""
    rewards = matrix([1.0, 1.0, 0.0, 0.0], [0] * 4)

    def first(**keys):
        config = AdvantageConfig(**{"group_eps": 0.0, "batch_eps": 0.0, **keys})
        return compute_advantages(rewards, config, torch.tensor([1, 1, 3, 3])).advantages[0].item()

    h = math.sqrt(3) / 2
    assert first(batch_norm="none") == pytest.approx(h)
    assert first() == pytest.approx(h)
    assert first(batch_ddof=0) == pytest.approx(1.0)
    assert first(batch_eps=0.5) == pytest.approx(h / 1.5)
    n = 4.5 / 4
    assert first(batch_eps=0.5, batch_eps_mode="var_rsqrt") == pytest.approx(
        h / math.sqrt(1 / n + 0.5)
    )
    # Per token: mean -h/2, sum of squares 8 h^2 - 8 h^2 / 4 = 6 h^2 = 4.5.
    assert first(batch_norm="token") == pytest.approx(1.5 * h / math.sqrt(4.5 / 7))
    assert first(batch_std_floor=2.0) == pytest.approx(h / 2)
    assert first(batch_std_floor=0.5) == pytest.approx(h)
    assert first(advantage_cap=0.25) == 0.25
    assert first(batch_norm_min_rewards=2, batch_std_floor=2.0) == pytest.approx(h)


def test_floor_and_cap_are_counted():
    rewards = matrix([1.0, 0.0, 0.0, 0.0], [0] * 4)
    stats = compute_advantages(
        rewards, AdvantageConfig(batch_std_floor=3.0, advantage_cap=0.2)
    ).stats
    assert stats["batch_std_floor_active"] == 1.0
    assert stats["num_capped"] == 1.0
    assert stats["batch_std"] == pytest.approx(1.0, rel=1e-5)
    stats = compute_advantages(rewards, AdvantageConfig(batch_std_floor=0.3)).stats
    assert stats["batch_std_floor_active"] == 0.0


def test_sums_that_do_not_vary_are_not_blown_up():
    """batch eps 0 and nothing alive: 0, not 0 / 0."""
    rewards = matrix([[0.1, 0.7]] * 6, [0, 0, 0, 1, 1, 1], dtype=torch.float32)
    for preset in PRESETS:
        config = AdvantageConfig.from_preset(preset, group_eps=0.0, batch_eps=0.0)
        batch = compute_advantages(rewards, config, torch.arange(6) + 1)
        assert batch.advantages.tolist() == [0.0] * 6


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"group_eps": -1e-6}, "group_eps"),
        ({"batch_eps": -1.0}, "batch_eps"),
        ({"group_ddof": -1}, "group_ddof"),
        ({"batch_std_floor": 0.0}, "batch_std_floor"),
        ({"advantage_cap": -1.0}, "advantage_cap"),
        ({"batch_norm": "batch"}, "'sequence', 'token' or 'none'"),
        ({"missing": "ignore"}, "'exclude', 'zero' or 'error'"),
        ({"preset": "trl2"}, "'nemo_rl' or 'ms_swift'"),
        ({"gruop_eps": 1e-6}, "gruop_eps"),
        ({"weights": {"a": math.inf}}, "finite"),
        ({"weights": [1.0, 2.0]}, "dictionary|mapping"),
        ({"group_std": "others"}, "needs group_eps_mode 'positive_only'"),
        ({"constant_test": "std_positive", "constant_atol": 0.1}, "belongs to constant_test"),
        ({"gd2po": {"snr_threshold": 1.5}}, "snr_threshold"),
    ],
)
def test_bad_config_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        AdvantageConfig(**keys)


def test_bad_input_is_answered_in_one_line():
    good = matrix([[1.0, 2.0], [0.0, 1.0]], [0, 0])

    def problem(rewards=good, num_tokens=None, **keys):
        with pytest.raises(InputError) as error:
            compute_advantages(rewards, AdvantageConfig(**keys), num_tokens)
        assert all("\n" not in line for line in error.value.problems)
        return error.value.problems

    unknown, missing = problem(weights={"correct": 1.0, "formt": 1.0})
    assert "names 'formt', which is no reward of this batch; did you mean 'format'?" in unknown
    assert "no weight for reward 'format'" in missing
    assert "group_ddof is 2, but group 0 has 2 valid entries" in problem(group_ddof=2)[0]
    assert "batch_ddof is 2, but the batch stage has only 2" in problem(batch_ddof=2)[0]
    assert "no num_tokens was given" in problem(batch_norm="token")[0]
    assert "must be [2], got (3,)" in problem(num_tokens=torch.ones(3))[0]
    assert "lengths are not negative" in problem(num_tokens=torch.tensor([1, -1]))[0]
    assert "did you mean 'grpo_no_std'" in problem(estimator="grpo_nostd")[0]
    nan = matrix([[1.0, NAN], [0.0, 1.0]], [0, 0])
    assert "reward 'format' of row 0 is nan but marked valid" in problem(nan)[0]
    inf = matrix([[1.0, 1.0], [math.inf, 1.0]], [0, 0])
    assert "reward 'correct' of row 1 is inf but marked valid" in problem(inf)[0]
    huge = matrix([1e200, -1e200], [7, 7])
    assert "reward 'correct' of group 7 spreads so far" in problem(huge)[0]
    with pytest.raises(InputError, match="no advantage preset 'verll'; did you mean 'verl'"):
        AdvantageConfig.from_preset("verll")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(2)}, r"must be \[B, 1\]"),
        ({"values": torch.zeros(2, 2)}, r"must be \[B, 1\]"),
        (
            {"values": torch.zeros(2, 1, dtype=torch.long)},
            "must be floating point, got torch.int64",
        ),
        ({"values": [[0.0], [1.0]]}, "must be a tensor, got list"),
        ({"valid": torch.ones(2, 1)}, "valid must be bool"),
        ({"valid": torch.ones(2, dtype=torch.bool)}, "valid must be bool"),
        ({"group_ids": torch.zeros(3, dtype=torch.long)}, r"group_ids must be int64 \[2\]"),
        ({"group_ids": torch.zeros(2)}, "group_ids must be int64"),
        ({"names": ("a", "a"), "values": torch.zeros(2, 2)}, "a name twice"),
    ],
)
def test_a_reward_matrix_of_wrong_shape_or_type_is_refused(change, message):
    good = {
        "names": ("a",),
        "values": torch.zeros(2, 1),
        "valid": torch.ones(2, 1, dtype=torch.bool),
        "group_ids": torch.zeros(2, dtype=torch.long),
    }
    with pytest.raises(ValueError, match=message):
        RewardMatrix(**{**good, **change})


def test_records_are_built_by_position():
    values, valid = torch.zeros(2, 1), torch.ones(2, 1, dtype=torch.bool)
    rewards = RewardMatrix(("a",), values, valid, torch.zeros(2, dtype=torch.long), {(0, "a"): "x"})
    assert rewards.reasons == {(0, "a"): "x"}
    batch = AdvantageBatch(torch.zeros(2), torch.zeros(2, 1), torch.zeros(2), {"batch_std": 1.0})
    assert batch.stats["batch_std"] == 1.0
    assert batch.loss_rows.tolist() == [True, True]


def test_own_estimator_from_a_file_and_from_the_registry(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from gdpo_megatron.algorithms import Estimate\n"
        "def top(rewards, config):\n"
        "    return Estimate(rewards.values, rewards.values @ rewards.weights)\n"
        "def short(rewards, config):\n"
        "    return Estimate(rewards.values, rewards.weights)\n"
    )
    rewards = matrix([[1.0, 2.0], [0.0, 1.0], [3.0, 3.0]], [4, 2, 4])
    config = AdvantageConfig(estimator="./mine.py:top", batch_norm="none")
    batch = compute_advantages(rewards, config, base_dir=tmp_path)
    assert batch.advantages.tolist() == [3.0, 1.0, 6.0]
    assert resolve_estimator("./mine.py:top", tmp_path) is resolve_estimator(
        "mine.py:top", tmp_path
    )
    short = AdvantageConfig(estimator="./mine.py:short")
    with pytest.raises(InputError, match=r"must return per_reward \(3, 2\) and combined \(3,\)"):
        compute_advantages(rewards, short, base_dir=tmp_path)
    with pytest.raises(InputError, match=r"no file .*mine\.py"):
        compute_advantages(rewards, config, base_dir=tmp_path / "elsewhere")
    assert {"gdpo", "grpo", "grpo_no_std", "gd2po"} <= set(ESTIMATORS.names())


def test_an_estimator_sees_sorted_groups_and_zeros_where_invalid():
    seen: list[GroupedRewards] = []

    @ESTIMATORS.register("spy_of_this_test")
    def spy(rewards: GroupedRewards, config: AdvantageConfig) -> Estimate:
        seen.append(rewards)
        return Estimate(rewards.values, rewards.values.sum(1))

    valid = [[True], [False], [True]]
    rewards = matrix([[1.0], [NAN], [3.0]], [4, 2, 4], valid, dtype=torch.float32)
    compute_advantages(rewards, AdvantageConfig(estimator="spy_of_this_test"))
    assert seen[0].values.tolist() == [[0.0], [1.0], [3.0]]
    assert seen[0].values.dtype == torch.float64
    assert seen[0].groups.ids.tolist() == [2, 4]
    assert seen[0].groups.sizes.tolist() == [1, 2]


def test_a_spread_whose_square_underflows_is_no_signal():
    """1e-200 squared is 0: the group cannot be scaled, and must not become infinite."""
    for estimator in ("gdpo", "grpo"):
        assert combined([1e-200, 0.0, 0.0], [0] * 3, estimator=estimator) == [0.0] * 3


def test_a_large_common_offset_costs_no_digits():
    plain = combined([0.0, 0.25, 1.0, 0.5], [0] * 4)
    assert combined([2.0**40, 2.0**40 + 0.25, 2.0**40 + 1, 2.0**40 + 0.5], [0] * 4) == plain


def test_the_estimator_in_the_docs_runs(tmp_path):
    """R = 3, 1, 2, 2 in two groups: the best of each is 1."""
    docs = Path(__file__).parents[3] / "docs" / "algorithms.md"
    code = docs.read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "my_estimators.py").write_text(code)
    config = AdvantageConfig(estimator="./my_estimators.py:best_only", batch_norm="none")
    rewards = matrix([[1.0, 2.0], [1.0, 0.0], [2.0, 0.0], [0.0, 2.0]], [0, 0, 1, 1])
    batch = compute_advantages(rewards, config, base_dir=tmp_path)
    assert batch.advantages.tolist() == [1.0, 0.0, 1.0, 1.0]
