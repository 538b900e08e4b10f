"""The paper's count of distinct advantage groups (fig. 3), by enumeration.

All multisets of G reward vectors from {0, 1}^K, ddof 1, no eps, no batch stage; distinct sorted
tuples of advantages, to 1e-6. GRPO looks at the sum alone, so for it one vector per sum stands for
all, which reaches K = 8.
"""

from __future__ import annotations

from itertools import combinations_with_replacement, product

import pytest
import torch

from gdpo_megatron.algorithms import compute_advantages
from gdpo_megatron.config.advantage import AdvantageConfig

from .helpers import matrix

SIZES = range(2, 17)
K2 = {
    "grpo": (2, 4, 7, 11, 16, 22, 29, 37, 46, 56, 67, 79, 92, 106, 121),
    "grpo_no_std": (3, 6, 10, 15, 21, 28, 36, 45, 55, 66, 78, 91, 105, 120, 136),
    "gdpo": (3, 6, 14, 26, 38, 59, 81, 109, 145, 186, 230, 288, 350, 419, 497),
}
G4 = {
    "grpo": (4, 7, 14, 23, 41, 56, 89, 119),
    "grpo_no_std": (4, 10, 20, 35, 56, 84, 120, 165),
    "gdpo": (4, 14, 45, 127, 318, 722),
}


def count(estimator: str, groups: torch.Tensor, ordered: bool = False) -> int:
    """Distinct advantage tuples of groups [P, G, K]."""
    num_groups, group_size, num_rewards = groups.shape
    rewards = matrix(
        groups.reshape(-1, num_rewards), torch.arange(num_groups).repeat_interleave(group_size)
    )
    config = AdvantageConfig(estimator=estimator, group_eps=0.0, batch_norm="none")
    advantages = compute_advantages(rewards, config).advantages.reshape(num_groups, group_size)
    if not ordered:
        advantages = advantages.sort(dim=1).values
    return len(torch.unique((advantages * 1e6).round().long(), dim=0))


def vectors(num_rewards: int) -> torch.Tensor:
    return torch.tensor(list(product((0.0, 1.0), repeat=num_rewards)))


def multisets(num_kinds: int, group_size: int) -> torch.Tensor:
    return torch.tensor(list(combinations_with_replacement(range(num_kinds), group_size)))


@pytest.mark.parametrize("estimator", sorted(K2))
@pytest.mark.parametrize("group_size", SIZES)
def test_two_rewards(estimator, group_size):
    groups = vectors(2)[multisets(4, group_size)]
    assert count(estimator, groups) == K2[estimator][group_size - 2]


@pytest.mark.parametrize("estimator", sorted(G4))
@pytest.mark.parametrize("num_rewards", [1, 2, 3, 4, 5, pytest.param(6, marks=pytest.mark.full)])
def test_groups_of_four(estimator, num_rewards):
    groups = vectors(num_rewards)[multisets(2**num_rewards, 4)]
    assert count(estimator, groups) == G4[estimator][num_rewards - 1]


@pytest.mark.parametrize("estimator", ["grpo", "grpo_no_std"])
@pytest.mark.parametrize("num_rewards", range(1, 9))
def test_groups_of_four_by_sum(estimator, num_rewards):
    by_sum = torch.tril(torch.ones(num_rewards + 1, num_rewards), diagonal=-1)
    groups = by_sum[multisets(num_rewards + 1, 4)]
    assert count(estimator, groups) == G4[estimator][num_rewards - 1]


@pytest.mark.parametrize(("group_size", "expected"), [(4, (51, 65, 107)), (5, (181, 211, 421))])
def test_ordered_tuples_are_another_count(group_size, expected):
    groups = vectors(2)[torch.tensor(list(product(range(4), repeat=group_size)))]
    estimators = ("grpo", "grpo_no_std", "gdpo")
    assert tuple(count(e, groups, ordered=True) for e in estimators) == expected
