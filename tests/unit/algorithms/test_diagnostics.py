"""Each diagnostic by hand on one small batch."""

from __future__ import annotations

import math

import pytest
import torch

from gdpo_megatron.algorithms import advantage_diagnostics, compute_advantages, diagnostic_names
from gdpo_megatron.config.advantage import AdvantageConfig

from .helpers import matrix

# Groups: 0 live in both; 1 cancels; 2 constant high; 3 constant low, its format missing once.
VALUES = [
    [[1, 0], [1, 1], [0, 0], [0, 0]],
    [[1, 0], [1, 0], [0, 1], [0, 1]],
    [[1, 1]] * 4,
    [[0, 0]] * 4,
]
H = math.sqrt(3) / 2


def diagnose(estimator="gdpo", **keys):
    values = torch.tensor(VALUES, dtype=torch.float64).reshape(-1, 2)
    valid = torch.ones(16, 2, dtype=torch.bool)
    valid[15, 1] = False
    rewards = matrix(values, torch.arange(16) // 4, valid)
    config = AdvantageConfig(estimator=estimator, group_eps=0.0, batch_eps=0.0, **keys)
    lengths = torch.arange(16) % 4 * 10 + 1
    batch = compute_advantages(rewards, config, lengths)
    return advantage_diagnostics(rewards, batch, lengths, config), batch, lengths


def test_by_hand():
    metrics, batch, lengths = diagnose()
    assert set(metrics) <= set(diagnostic_names(("correct", "format")))
    # Group 0: A_1 = (h, h, -h, -h), A_2 = (-.5, 1.5, -.5, -.5); group 1: +-h and -+h.
    assert metrics["groups_without_signal"] == 3 / 4
    assert metrics["groups_cancelled"] == 1 / 4
    assert metrics["groups_without_signal/correct"] == 2 / 4
    assert metrics["saturated_high/correct"] == metrics["saturated_low/format"] == 1 / 4
    assert metrics["missing/format"] == 1 / 16
    assert metrics["missing/correct"] == 0
    sum_of_squares = 6 + 4 * H  # (h - .5)^2 + (h + 1.5)^2 + 2 (h + .5)^2
    first = 3 + 2 * H  # sum A_1 (A_1 + A_2) = 4 h^2 + h (1.5 - .5 + .5 + .5); group 1 adds 0
    assert metrics["variance_share/correct"] == pytest.approx(first / sum_of_squares)
    assert metrics["variance_share/format"] == pytest.approx(1 - first / sum_of_squares)
    magnitude = 8 * H + 3 + 4 * H
    assert metrics["abs_share/correct"] == pytest.approx(8 * H / magnitude)
    assert metrics["abs_share/format"] == pytest.approx((3 + 4 * H) / magnitude)
    left = (H - 0.5) + (H + 1.5) + 2 * (H + 0.5)
    assert metrics["cancellation"] == pytest.approx(1 - left / magnitude)
    assert metrics["cancellation/correct|format"] == pytest.approx(1 - left / magnitude)
    assert metrics["conflict/correct|format"] == pytest.approx(5 / 8)
    # sum A_1 A_2 = 2h - 4 h^2 over sqrt(8 h^2 (3 + 4 h^2)) = sqrt(36).
    assert metrics["correlation/correct|format"] == pytest.approx((2 * H - 3) / 6)
    assert metrics["num_distinct_gdpo"] == 4  # h - .5, h + 1.5, -h - .5, 0
    assert metrics["num_distinct_grpo_no_std"] == 4  # R = 1, 2, 0, 0 minus .75, and 0
    assert metrics["zero_advantages"] == 12 / 16
    assert metrics["advantage_abs_max"] == pytest.approx(float(batch.advantages.max()))
    x = torch.stack([batch.advantages, lengths.double()])
    assert metrics["length_correlation"] == pytest.approx(float(torch.corrcoef(x)[0, 1]))
    assert metrics["batch_std"] == pytest.approx(math.sqrt(sum_of_squares / 15))
    assert metrics["sign_differs_from_grpo"] == 0


def test_sign_against_grpo():
    """Weights 1 and 3 with spreads 3 and 1: the sum follows the first reward, GDPO the second."""
    rewards = matrix([[6.0, 0.0], [0.0, 1.0]], [0, 0])
    config = AdvantageConfig(weights={"correct": 1.0, "format": 3.0})
    batch = compute_advantages(rewards, config)
    metrics = advantage_diagnostics(rewards, batch, None, config)
    assert metrics["sign_differs_from_grpo"] == 1.0
    assert "length_correlation" not in metrics


@pytest.mark.parametrize("estimator", ["gdpo", "grpo", "grpo_no_std", "gd2po"])
def test_shares_add_up_to_one_and_all_names_are_declared(estimator):
    metrics, _, _ = diagnose(estimator, weights={"correct": 2.0, "format": -1.0})
    for kind in ("variance_share", "abs_share"):
        assert sum(metrics[f"{kind}/{r}"] for r in ("correct", "format")) == pytest.approx(1)
    declared = diagnostic_names(("correct", "format"))
    assert set(metrics) <= set(declared)
    assert all(math.isfinite(value) for value in metrics.values())
    assert all(info.unit and info.definition for info in declared.values())


def test_every_declared_diagnostic_is_reached():
    reached = set(diagnose()[0]) | set(diagnose("gd2po", advantage_cap=0.5)[0])
    assert reached == set(diagnostic_names(("correct", "format")))


@pytest.mark.parametrize("num_rows", [0, 1, 3])
def test_undefined_values_are_absent(num_rows):
    rewards = matrix(torch.ones(num_rows, 2), torch.zeros(num_rows, dtype=torch.long))
    batch = compute_advantages(rewards, AdvantageConfig())
    metrics = advantage_diagnostics(rewards, batch, torch.ones(num_rows), AdvantageConfig())
    assert not [name for name in metrics if name.startswith(("variance_share", "correlation"))]
    assert all(math.isfinite(value) for value in metrics.values())
    if num_rows:
        assert metrics["groups_without_signal"] == 1.0
