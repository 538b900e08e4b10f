"""Each preset against its published formula, written here once more with loops and plain floats.

The formulas are those of the sources named in config/advantage.py, in exact arithmetic: float32
residues of constant groups, which some of them blow up, are not reproduced. TRL itself is run in
test_trl.py; the others are not installed and stand here as formulas only.
"""

from __future__ import annotations

import math

import pytest
import torch

from gdpo_megatron.algorithms import compute_advantages
from gdpo_megatron.config.advantage import PRESETS, AdvantageConfig
from gdpo_megatron.errors import InputError

from .helpers import NAMES, matrix, std

NAN = math.nan
WEIGHTS = {"correct": 1.0, "format": 2.0, "length": 0.5}


def mean(values):
    return math.fsum(values) / len(values)


def live(values):
    return len(values) >= 2 and max(values) > min(values)


def groups_of(group_ids):
    return [[i for i, g in enumerate(group_ids) if g == h] for h in sorted(set(group_ids))]


def group_stage(rows, group_ids, weights, normalise):
    """Sum_k w_k normalise(values of the group)_k; normalise sees one reward of one group."""
    combined = [0.0] * len(rows)
    for members in groups_of(group_ids):
        for k, weight in enumerate(weights):
            values = [rows[i][k] for i in members]
            for i, a in zip(members, normalise(values), strict=True):
                combined[i] += weight * a
    return combined


def paper(rows, group_ids, weights, lengths):
    def normalise(v):
        have = [x for x in v if not math.isnan(x)]
        if not live(have):
            return [0.0] * len(v)
        return [0.0 if math.isnan(x) else (x - mean(have)) / (std(have) + 1e-6) for x in v]

    a = group_stage(rows, group_ids, weights, normalise)
    scored = [not all(math.isnan(x) for x in row) for row in rows]
    counted = [x for x, s in zip(a, scored, strict=True) if s]
    return [
        (x - mean(counted)) / (std(counted) + 1e-6) if s else 0.0
        for x, s in zip(a, scored, strict=True)
    ]


def trl(rows, group_ids, weights, lengths):
    def normalise(v):
        have = [x for x in v if not math.isnan(x)]
        if len(have) < 2:
            return [0.0] * len(v)
        return [0.0 if math.isnan(x) else (x - mean(have)) / (std(have) + 1e-4) for x in v]

    a = group_stage(rows, group_ids, weights, normalise)
    scored = [not all(math.isnan(x) for x in row) for row in rows]
    counted = [x for x, s in zip(a, scored, strict=True) if s]
    return [
        (x - mean(counted)) / (std(counted) + 1e-4) if s else 0.0
        for x, s in zip(a, scored, strict=True)
    ]


def ms_swift(rows, group_ids, weights, lengths):
    def normalise(v):
        have = [x for x in v if not math.isnan(x)]
        if not live(have):
            return [0.0] * len(v)
        return [0.0 if math.isnan(x) else (x - mean(have)) / (std(have) + 1e-8) for x in v]

    a = group_stage(rows, group_ids, weights, normalise)
    return [(x - mean(a)) / (std(a) + 1e-8) for x in a]


def nvlabs_trl(rows, group_ids, weights, lengths):
    rows = [[0.0 if math.isnan(x) else x for x in row] for row in rows]

    def normalise(v):
        if len(v) < 2:
            return [0.0] * len(v)
        return [(x - mean(v)) / (std(v) + 1e-4) for x in v]

    a = group_stage(rows, group_ids, weights, normalise)
    if len(weights) == 1:
        return a
    return [(x - mean(a)) / (std(a) + 1e-4) for x in a]


def verl(rows, group_ids, weights, lengths):
    def normalise(v):
        if len(v) == 1:
            return [v[0] / (1.0 + 1e-6)]
        return [(x - mean(v)) / (std(v) + 1e-6) for x in v]

    a = group_stage(rows, group_ids, weights, normalise)
    tokens = [x for x, n in zip(a, lengths, strict=True) for _ in range(n)]
    n = len(tokens)
    centre = math.fsum(tokens) / (n + 1e-8)
    var = math.fsum((x - centre) ** 2 for x in tokens) / (n + 1e-8) * n / (n - 1)
    return [(x - centre) / math.sqrt(var + 1e-8) for x in a]


def nemo_rl(rows, group_ids, weights, lengths, leave_one_out=False):
    def normalise(v):
        if len(v) < 2:
            return [0.0] * len(v)
        result = []
        for i, x in enumerate(v):
            base = v[:i] + v[i + 1 :] if leave_one_out else v
            spread = std(base) if live(base) else 0.0
            result.append((x - mean(base)) / (spread + 1e-6) if spread else x - mean(base))
        return result

    a = group_stage(rows, group_ids, weights, normalise)
    return [(x - mean(a)) / std(a) for x in a]


FORMULAS = {
    "paper": paper,
    "nvlabs_trl": nvlabs_trl,
    "nvlabs_verl": verl,
    "verl": verl,
    "trl": trl,
    "nemo_rl": nemo_rl,
    "ms_swift": ms_swift,
}
TAKES_MISSING = ("paper", "nvlabs_trl", "trl", "ms_swift")


def make_rows(seed: int, num_rewards: int, missing: bool):
    """Groups of 1, 2, 4, 4, 5 and 8; binary, stepped and real rewards; a row without any score."""
    generator = torch.Generator().manual_seed(seed)
    group_ids = [0] * 4 + [1] * 4 + [2] * 2 + [3] * 8 + [4] * 5 + [5]
    n = len(group_ids)
    values = torch.rand(n, 3, generator=generator, dtype=torch.float64)
    values[:, 0] = (values[:, 0] > 0.5).double()
    values[:, 1] = (values[:, 1] * 7).floor() - 3
    values = values[:, :num_rewards]
    if missing:
        values[torch.rand(n, num_rewards, generator=generator) < 0.2] = NAN
        values[6] = NAN
    lengths = torch.randint(1, 40, (n,), generator=generator).tolist()
    return values.tolist(), group_ids, lengths


def ours(rows, group_ids, lengths, config):
    values = torch.tensor(rows, dtype=torch.float64)
    rewards = matrix(values, group_ids, ~values.isnan())
    return compute_advantages(rewards, config, torch.tensor(lengths)).advantages


def test_every_preset_is_tested():
    assert set(FORMULAS) == set(PRESETS)


@pytest.mark.parametrize("num_rewards", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("name", "missing"), [*((n, False) for n in PRESETS), *((n, True) for n in TAKES_MISSING)]
)
def test_preset_is_its_formula(name, seed, num_rewards, missing):
    rows, group_ids, lengths = make_rows(seed, num_rewards, missing)
    weights = dict(list(WEIGHTS.items())[:num_rewards])
    expected = FORMULAS[name](rows, group_ids, list(weights.values()), lengths)
    config = AdvantageConfig.from_preset(name, weights=weights)
    torch.testing.assert_close(
        ours(rows, group_ids, lengths, config),
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize("seed", range(4))
def test_nemo_rl_with_its_class_default_leave_one_out(seed):
    """A lone success has constant others: NeMo-RL leaves its deviation unscaled."""
    rows, group_ids, lengths = make_rows(seed, 3, False)
    rows[0][0], rows[1][0], rows[2][0], rows[3][0] = 1.0, 0.0, 0.0, 0.0
    weights = list(WEIGHTS.values())
    config = AdvantageConfig.from_preset("nemo_rl", weights=WEIGHTS, baseline="leave_one_out")
    expected = nemo_rl(rows, group_ids, weights, lengths, leave_one_out=True)
    torch.testing.assert_close(
        ours(rows, group_ids, lengths, config),
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize("name", sorted(set(PRESETS) - set(TAKES_MISSING)))
def test_presets_without_a_rule_for_missing_rewards_say_so(name):
    with pytest.raises(InputError, match=r"row 1 has no reward 'correct'.*missing: exclude"):
        ours([[1.0], [NAN]], [0, 0], [1, 1], AdvantageConfig.from_preset(name))


def test_the_worked_example_of_the_docs():
    """Hand-worked in docs/algorithms.md: one live and one dead group, weights 1 and 2."""
    rows = [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]] + [[1.0, 0.0]] * 4
    rewards = matrix(rows, [0] * 4 + [1] * 4)
    config = AdvantageConfig(weights={"correct": 1.0, "format": 2.0}, group_eps=0.0, batch_eps=0.0)
    batch = compute_advantages(rewards, config)
    h = math.sqrt(3) / 2
    assert batch.per_reward[:4].tolist() == [
        pytest.approx([h, 1.5]),
        pytest.approx([h, -0.5]),
        pytest.approx([-h, -0.5]),
        pytest.approx([-h, -0.5]),
    ]
    assert batch.combined[:4].tolist() == pytest.approx([h + 3, h - 1, -h - 1, -h - 1])
    assert batch.stats["batch_std"] == pytest.approx(math.sqrt((15 + 8 * h) / 7))
    assert batch.advantages.tolist() == pytest.approx(
        [2.18430, -0.07570, -1.05430, -1.05430, 0, 0, 0, 0], abs=1e-5
    )


def test_token_whitening_pays_a_dead_group():
    """Short successes beside a dead group: verl gives the dead one +0.87, per rollout it is 0."""
    rewards = matrix([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0] * 4 + [1] * 4)
    lengths = torch.tensor([20, 20, 200, 200, 60, 60, 60, 60])
    verl_like = compute_advantages(rewards, AdvantageConfig.from_preset("verl"), lengths)
    assert verl_like.combined[:4].tolist() == pytest.approx(
        [0.866, 0.866, -0.866, -0.866], abs=1e-3
    )
    assert verl_like.advantages[4:].tolist() == pytest.approx([0.8735] * 4, abs=5e-4)
    paper_like = compute_advantages(rewards, AdvantageConfig(), lengths)
    assert paper_like.advantages[4:].tolist() == [0.0] * 4


def test_figure_2_is_the_group_stage_alone():
    """Paper, fig. 2: (0,1) against (0,2) for G=2; GRPO cannot tell them apart, GDPO can."""
    both = matrix([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]], [0, 0, 1, 1])
    bare = {"group_eps": 0.0, "batch_norm": "none"}
    gdpo = compute_advantages(both, AdvantageConfig(**bare)).advantages
    grpo = compute_advantages(both, AdvantageConfig(estimator="grpo", **bare)).advantages
    r = math.sqrt(0.5)
    assert gdpo.tolist() == pytest.approx([-r, r, -2 * r, 2 * r])
    assert grpo.tolist() == pytest.approx([-r, r, -r, r])


def test_three_rewards_with_constant_sum_survive_where_two_cancel():
    survives = matrix([[1.0, 1, 0], [1, 1, 0], [1, 0, 1], [0, 1, 1]], [0] * 4)
    batch = compute_advantages(survives, AdvantageConfig(group_eps=0.0, batch_norm="none"))
    # Spreads: correct and format 1 of 4 differs (1.5/0.5), length 2 of 4 (0.866).
    assert batch.advantages.tolist() == pytest.approx(
        [1 - 3**0.5 / 2, 1 - 3**0.5 / 2, -1 + 3**0.5 / 2, -1 + 3**0.5 / 2]
    )
    assert batch.advantages[0].item() == pytest.approx(0.13, abs=5e-3)
    cancels = matrix([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [0] * 3)
    assert compute_advantages(cancels, AdvantageConfig()).advantages.tolist() == [0.0] * 3
    weighted = AdvantageConfig(weights={"correct": 2.0, "format": 1.0})
    assert compute_advantages(cancels, weighted).advantages.abs().min() > 0.1


def test_names_order_nothing():
    """Weights go by name; NeMo-RL's alphabetical order would swap these two."""
    rows = [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]
    config = AdvantageConfig(weights={"a": 1.0, "z": 5.0}, batch_norm="none")
    one = compute_advantages(matrix(rows, [0] * 3, names=("z", "a")), config)
    swapped = [[b, a] for a, b in rows]
    other = compute_advantages(matrix(swapped, [0] * 3, names=("a", "z")), config)
    assert one.advantages.tolist() == pytest.approx(other.advantages.tolist())
    assert one.advantages[0] > one.advantages[2]
    assert NAMES[0] == "correct"
