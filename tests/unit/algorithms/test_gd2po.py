"""GD2PO by hand: which rollouts conflict, and what becomes of the rest."""

from __future__ import annotations

import math

import pytest

from gdpo_megatron.algorithms import compute_advantages
from gdpo_megatron.config.advantage import AdvantageConfig

from .helpers import matrix

BARE = {"estimator": "gd2po", "group_eps": 0.0, "batch_norm": "none"}

# (1, 0), (1, 1), (0, 0), (0, 0): A_1 = (h, h, -h, -h), A_2 = (-.5, 1.5, -.5, -.5); row 0 conflicts.
VALUES = [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
H = math.sqrt(3) / 2


def advantages(**keys):
    options = {"gd2po": keys.pop("gd2po", {})}
    return compute_advantages(matrix(VALUES, [0] * 4), AdvantageConfig(**BARE, **options, **keys))


def test_hard_drops_the_conflict_and_scales_the_rest():
    batch = advantages()
    kept = [0.0, 0.75 * (H + 1.5), -0.75 * (H + 0.5), -0.75 * (H + 0.5)]
    assert batch.advantages.tolist() == pytest.approx(kept)
    assert batch.loss_rows.tolist() == [False, True, True, True]
    assert batch.stats["num_dropped_for_conflict"] == 1.0
    unscaled = advantages(gd2po={"scale_by_kept": False})
    assert unscaled.advantages.tolist() == pytest.approx([x / 0.75 for x in kept])


def test_snr_drops_only_the_undecided():
    """Row 0: |h - 0.5| / (h + 0.5) = 0.268."""
    assert advantages(gd2po={"mode": "snr", "snr_threshold": 0.3}).loss_rows.tolist()[0] is False
    batch = advantages(gd2po={"mode": "snr", "snr_threshold": 0.2})
    assert batch.loss_rows.tolist() == [True] * 4
    gdpo = AdvantageConfig(**{**BARE, "estimator": "gdpo"})
    same = compute_advantages(matrix(VALUES, [0] * 4), gdpo)
    assert batch.advantages.tolist() == same.advantages.tolist()


def test_a_reward_of_weight_zero_cannot_conflict():
    batch = advantages(weights={"correct": 1.0, "format": 0.0})
    assert batch.loss_rows.tolist() == [True] * 4


def test_eq_6_runs_over_the_kept_rows_alone():
    """Sums of the kept rows a, -b, -b with a = .75 (h + 1.5), b = .75 (h + .5): whitened."""
    config = AdvantageConfig(estimator="gd2po", group_eps=0.0, batch_eps=0.0)
    batch = compute_advantages(matrix(VALUES, [0] * 4), config)
    r = 1 / math.sqrt(3)
    assert batch.advantages.tolist() == pytest.approx([0.0, 2 * r, -r, -r])


def test_the_kept_share_counts_scored_rows():
    valid = [[True, True]] * 4 + [[False, False]]
    rewards = matrix([*VALUES, [0.0, 0.0]], [0] * 5, valid)
    batch = compute_advantages(rewards, AdvantageConfig(**BARE))
    assert batch.advantages[1].item() == pytest.approx(0.75 * (H + 1.5))
    assert batch.loss_rows.tolist() == [False, True, True, True, False]
