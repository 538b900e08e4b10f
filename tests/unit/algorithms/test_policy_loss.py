"""The loss against a second implementation in plain floats, its gradient against differences.

Not covered: the log-probs themselves (policy tests) and sums over real ranks (distributed tests);
here ranks are parts of a batch whose sums are added by hand.
"""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from gdpo_megatron.algorithms import (
    LOSS_METRICS,
    loss_denominator,
    loss_metrics,
    policy_loss_terms,
)
from gdpo_megatron.algorithms.aggregation import token_weights
from gdpo_megatron.config.loss import LossConfig
from gdpo_megatron.errors import InputError

MAX_TOKENS = 9


def make_batch(seed: int = 0, rows: int = 4, length: int = 7, dtype=torch.float64):
    """Completions of 0 to `length` tokens with holes in the mask; ratios on both sides of clips."""
    g = torch.Generator().manual_seed(seed)

    def noise(scale):
        return scale * torch.randn(rows, length, generator=g, dtype=torch.float64)

    mask = torch.rand(rows, length, generator=g) > 0.25
    mask[-1] = False
    logprobs = -torch.rand(rows, length, generator=g, dtype=torch.float64) - 0.5
    old = logprobs + noise(0.3)
    advantages = torch.randn(rows, generator=g, dtype=torch.float64)
    batch = {
        "logprobs": logprobs,
        "old_logprobs": old,
        "ref_logprobs": logprobs + noise(0.4),
        "rollout_logprobs": old + noise(0.5),
        "entropy": noise(1.0).abs(),
    }
    # Where masked, anything may stand.
    batch = {k: torch.where(mask, v, torch.nan).to(dtype) for k, v in batch.items()}
    return batch | {"advantages": advantages.to(dtype), "loss_mask": mask}


def reference_loss(batch, x, x0, config: LossConfig) -> float:
    """Sum of weighted token losses; x are the log-probs, x0 those that stop-gradients see."""
    total = 0.0
    low, high = 1 - config.clip_eps_low, 1 + config.clip_eps_high
    m = config.mismatch
    for row in range(len(x)):
        tokens = [t for t in range(x.shape[1]) if batch["loss_mask"][row, t]]
        if not tokens:
            continue
        value = {k: [float(batch[k][row, t]) for t in tokens] for k in batch if k.endswith("probs")}
        new = [float(x[row, t]) for t in tokens]
        frozen = [float(x0[row, t]) for t in tokens]
        old = {
            "recompute": value["old_logprobs"],
            "current": frozen,
            "rollout": value["rollout_logprobs"],
        }[config.old_logprobs]
        a = float(batch["advantages"][row])
        log_r = [n - o for n, o in zip(new, old, strict=True)]
        log_w = [o - r for o, r in zip(old, value["rollout_logprobs"], strict=True)]
        if m.correction.startswith("sequence"):
            s = math.fsum(log_w)
            s = s if m.sequence_weight == "product" else s / len(log_w)
            log_w = [s] * len(log_w)
        for t, token in enumerate(tokens):
            r = math.exp(log_r[t])
            if config.objective == "cispo":
                weight = min(max(math.exp(frozen[t] - old[t]), low), high)
                policy = -weight * a * new[t]
            else:
                if config.objective == "gspo":
                    r = math.exp(math.fsum(log_r) / len(log_r))
                objective = min(r * a, min(max(r, low), high) * a)
                if config.dual_clip and a < 0:
                    objective = max(objective, config.dual_clip * a)
                policy = -objective
            w = math.exp(log_w[t])
            policy *= {
                "none": 1.0,
                "token_truncate": min(w, m.max_importance_weight),
                "sequence_truncate": min(w, m.max_importance_weight),
                "token_mask": w * (w <= m.max_importance_weight),
                "sequence_mask": w * (w <= m.max_importance_weight),
                "icepop": w * (m.min_importance_weight <= w <= m.max_importance_weight),
            }[m.correction]
            delta = new[t] - value["ref_logprobs"][t]
            kl = {
                "k1": delta,
                "k2": delta**2 / 2,
                "k3": math.exp(-delta) - 1 + delta,
            }[config.kl_estimator]
            if config.kl_gradient == "unbiased":
                kl *= math.exp(log_r[t])
            loss = policy + config.kl_coef * kl
            loss -= config.entropy_coef * float(batch["entropy"][row, token])
            total += loss / (len(tokens) if config.aggregation == "sequence_mean" else 1)
    return total


CONFIGS = {
    "ppo": {},
    "ppo symmetric": {"clip_eps_low": 0.1, "clip_eps_high": 0.1},
    "dual clip": {"dual_clip": 1.1},
    "gspo": {"objective": "gspo", "clip_eps_low": 0.03, "clip_eps_high": 0.04},
    "gspo wide": {"objective": "gspo", "aggregation": "sequence_mean"},
    "cispo": {"objective": "cispo"},
    "sequence mean": {"aggregation": "sequence_mean"},
    "fixed length": {"aggregation": "fixed_length"},
    "k1 unbiased": {"kl_coef": 0.3, "kl_estimator": "k1", "kl_gradient": "unbiased"},
    "k2": {"kl_coef": 0.3, "kl_estimator": "k2"},
    "k3": {"kl_coef": 0.3},
    "k3 unbiased": {"kl_coef": 0.3, "kl_gradient": "unbiased"},
    "entropy": {"entropy_coef": 0.2},
    "old current": {"old_logprobs": "current", "kl_coef": 0.3, "kl_gradient": "unbiased"},
    "old rollout": {"old_logprobs": "rollout"},
    "all": {
        "objective": "cispo",
        "aggregation": "sequence_mean",
        "kl_coef": 0.1,
        "entropy_coef": 0.1,
        "mismatch": {"correction": "icepop"},
    },
    **{
        f"mismatch {correction} {weight}": {
            "mismatch": {
                "correction": correction,
                "max_importance_weight": 1.3,
                "min_importance_weight": 0.8,
                "sequence_weight": weight,
            }
        }
        for correction, weight in [
            ("token_truncate", "product"),
            ("token_mask", "product"),
            ("icepop", "product"),
            *product(("sequence_truncate", "sequence_mask"), ("product", "geometric_mean")),
        ]
    },
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CONFIGS)
def test_value_and_gradient(name, seed):
    """Value to 1e-12, gradient to 1e-7 of central differences in float64."""
    config, batch = LossConfig(**CONFIGS[name]), make_batch(seed)
    x0 = batch["logprobs"]
    x = x0.clone().requires_grad_()
    terms = policy_loss_terms(**{**batch, "logprobs": x}, config=config)
    terms.token_loss.sum().backward()
    value = float(terms.token_loss.detach().sum())
    assert value == pytest.approx(reference_loss(batch, x0, x0, config), rel=1e-12)
    assert x.grad is not None
    step = 1e-5
    for row, t in (batch["loss_mask"]).nonzero().tolist():
        up, down = x0.clone(), x0.clone()
        up[row, t] += step
        down[row, t] -= step
        slope = (
            reference_loss(batch, up, x0, config) - reference_loss(batch, down, x0, config)
        ) / (2 * step)
        assert float(x.grad[row, t]) == pytest.approx(slope, rel=2e-6, abs=1e-7), (row, t)
    assert bool((x.grad[~batch["loss_mask"]] == 0).all())


def test_every_value_of_every_choice_is_in_the_table():
    """The table above reaches each objective, aggregation, KL, old and mismatch choice."""
    configs = [LossConfig(**keys) for keys in CONFIGS.values()]
    for key, number in (
        ("objective", 3),
        ("aggregation", 3),
        ("kl_estimator", 3),
        ("kl_gradient", 2),
        ("old_logprobs", 3),
    ):
        assert len({getattr(config, key) for config in configs}) == number
    assert len({config.mismatch.correction for config in configs}) == 6


def test_ppo_clip_by_hand():
    """Ratios 1.5, 0.5, 1.1 and 5 at A = +-1 with bounds 0.8 and 1.28, dual clip 3."""
    ratio = torch.tensor([[1.5, 0.5, 1.1, 5.0]] * 2, dtype=torch.float64)
    x = ratio.log().requires_grad_()
    terms = policy_loss_terms(
        x,
        torch.zeros_like(ratio),
        torch.tensor([1.0, -1.0]),
        torch.ones_like(ratio, dtype=torch.bool),
        LossConfig(clip_eps_low=0.2, clip_eps_high=0.28, dual_clip=3.0),
    )
    terms.token_loss.sum().backward()
    assert terms.token_loss.tolist() == [
        pytest.approx([-1.28, -0.5, -1.1, -1.28]),
        pytest.approx([1.5, 0.8, 1.1, 3.0]),
    ]
    assert x.grad is not None
    assert x.grad.tolist() == [
        pytest.approx([0, -0.5, -1.1, 0]),
        pytest.approx([1.5, 0, 1.1, 0]),
    ]
    sums = {name: float(value) for name, value in terms.sums.items()}
    assert (sums["clip_high_fraction"], sums["clip_low_fraction"]) == (2, 1)
    assert sums["dual_clip_fraction"] == 1
    assert float(terms.maxima["ratio_max"]) == pytest.approx(5.0)


def test_gspo_by_hand():
    """Log ratios 0.3 and 0.1 and a masked one: s = e^0.2 at both tokens; gradient A s / 2 each."""
    x = torch.tensor([[0.3, 0.1, 9.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    config = LossConfig(objective="gspo", aggregation="sequence_mean", clip_eps_high=0.5)
    terms = policy_loss_terms(x, torch.zeros(1, 3), torch.tensor([2.0]), mask, config)
    terms.token_loss.sum().backward()
    assert float(terms.token_loss.detach().sum()) == pytest.approx(-2 * math.exp(0.2))
    assert x.grad is not None
    assert x.grad[0].tolist() == pytest.approx([-math.exp(0.2), -math.exp(0.2), 0])


def test_cispo_keeps_the_gradient_that_the_clip_would_take():
    x = torch.tensor([[math.log(5.0)]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    terms = policy_loss_terms(
        x, torch.zeros(1, 1), torch.tensor([1.0]), mask, LossConfig(objective="cispo")
    )
    terms.token_loss.sum().backward()
    assert x.grad is not None
    assert float(x.grad) == pytest.approx(-1.28)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "fixed_length"])
@pytest.mark.parametrize("objective", ["ppo_clip", "gspo", "cispo"])
def test_one_large_micro_batch_is_many_small_ones_on_any_ranks(objective, aggregation):
    """Rows of 2 ranks x micro-batches of 3, 1 and 2; one denominator for all."""
    config = LossConfig(
        objective=objective,
        aggregation=aggregation,
        kl_coef=0.1,
        entropy_coef=0.01,
        mismatch={"correction": "sequence_truncate"},  # pyright: ignore
    )
    batch = make_batch(5, rows=12)

    def run(parts):
        gradient = torch.zeros_like(batch["logprobs"])
        loss, sums, maxima = 0.0, {}, {}
        for rows in parts:
            part = {name: value[rows] for name, value in batch.items()}
            part["logprobs"] = part["logprobs"].clone().requires_grad_()
            terms = policy_loss_terms(**part, config=config)
            terms.token_loss.sum().backward()
            gradient[rows] = part["logprobs"].grad
            loss += float(terms.token_loss.detach().sum())
            for name, value in terms.sums.items():
                sums[name] = sums.get(name, 0.0) + float(value)
            for name, value in terms.maxima.items():
                maxima[name] = max(maxima.get(name, 0.0), float(value))
        denominator = loss_denominator(
            aggregation,
            num_loss_tokens=sums["num_loss_tokens"],
            num_loss_rows=sums["num_loss_rows"],
            max_completion_tokens=MAX_TOKENS,
        )
        return loss / denominator, gradient / denominator, loss_metrics(sums, maxima)

    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    loss, gradient, metrics = run([torch.arange(12)])
    # Ranks: rows 0-5 and 6-11 of the shuffled batch, each cut into 3 + 1 + 2.
    parts = [order[a:b] for a, b in ((0, 3), (3, 4), (4, 6), (6, 9), (9, 10), (10, 12))]
    split_loss, split_gradient, split_metrics = run(parts)
    assert split_loss == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(split_gradient, gradient, rtol=1e-12, atol=1e-14)
    assert split_metrics == pytest.approx(metrics, rel=1e-12)


def test_aggregations_by_hand():
    """Rows of 1 and 3 tokens, each with loss 1, and a row without any."""
    mask = torch.tensor([[True, False, False], [True, True, True], [False, False, False]])
    counts = {"num_loss_tokens": 4, "num_loss_rows": 2, "max_completion_tokens": MAX_TOKENS}
    results = {
        name: float(token_weights(mask, name).sum()) / loss_denominator(name, **counts)
        for name in ("token_mean", "sequence_mean", "fixed_length")
    }
    assert results == pytest.approx(
        {"token_mean": 1.0, "sequence_mean": 1.0, "fixed_length": 4 / (2 * MAX_TOKENS)}
    )
    share_of_short_row = float(token_weights(mask, "sequence_mean")[0].sum()) / 2
    assert share_of_short_row == 0.5
    nothing = {"num_loss_tokens": 0, "num_loss_rows": 0, "max_completion_tokens": 5}
    assert loss_denominator("token_mean", **nothing) == 1.0


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_kl_gradient_is_the_gradient_of_the_kl(estimator):
    """Exact expectation over a vocabulary of 7, tokens drawn from an old policy that differs."""
    g = torch.Generator().manual_seed(0)
    theta = torch.randn(7, generator=g, dtype=torch.float64, requires_grad=True)
    old = torch.randn(7, generator=g, dtype=torch.float64).log_softmax(0)
    ref = torch.randn(7, generator=g, dtype=torch.float64).log_softmax(0)

    def gradient(config):
        logprobs = theta.log_softmax(0)[None]
        terms = policy_loss_terms(
            logprobs,
            old[None],
            torch.zeros(1),
            torch.ones(1, 7, dtype=torch.bool),
            config,
            ref_logprobs=ref[None],
        )
        expected = (old.exp() * terms.token_loss[0]).sum()
        return torch.autograd.grad(expected, theta)[0]

    p = theta.log_softmax(0)
    true = torch.autograd.grad((p.exp() * (p - ref)).sum(), theta)[0]
    unbiased = LossConfig(kl_coef=1.0, kl_estimator=estimator, kl_gradient="unbiased")
    torch.testing.assert_close(gradient(unbiased), true, rtol=1e-10, atol=1e-12)
    direct = gradient(LossConfig(kl_coef=1.0, kl_estimator="k3"))
    assert float((direct - true).abs().max()) > 1e-2


def test_direct_k2_is_right_on_policy_and_k1_is_noise():
    g = torch.Generator().manual_seed(1)
    theta = torch.randn(5, generator=g, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(5, generator=g, dtype=torch.float64).log_softmax(0)
    p = theta.log_softmax(0)
    true = torch.autograd.grad((p.exp() * (p - ref)).sum(), theta, retain_graph=True)[0]
    k2 = (p.exp().detach() * 0.5 * (p - ref).square()).sum()
    torch.testing.assert_close(torch.autograd.grad(k2, theta, retain_graph=True)[0], true)
    k1 = (p.exp().detach() * (p - ref)).sum()
    assert float(torch.autograd.grad(k1, theta)[0].abs().max()) < 1e-12
    with pytest.raises(ValueError, match="expected gradient of zero"):
        LossConfig(kl_coef=0.1, kl_estimator="k1")


def test_mismatch_by_hand():
    """Weights 4, 0.25 and 1 under bounds 2 and 0.5; product 1, geometric mean 1."""
    rollout = torch.zeros(1, 3, dtype=torch.float64)
    old = torch.tensor([[4.0, 0.25, 1.0]], dtype=torch.float64).log()
    mask = torch.ones(1, 3, dtype=torch.bool)

    def weights(correction):
        config = LossConfig(mismatch={"correction": correction})  # pyright: ignore
        terms = policy_loss_terms(
            old, old, torch.tensor([-1.0]), mask, config, rollout_logprobs=rollout
        )
        return terms.token_loss[0].tolist(), terms

    assert weights("none")[0] == pytest.approx([1, 1, 1])
    assert weights("token_truncate")[0] == pytest.approx([2, 0.25, 1])
    assert weights("token_mask")[0] == pytest.approx([0, 0.25, 1])
    assert weights("icepop")[0] == pytest.approx([0, 0, 1])
    assert weights("sequence_truncate")[0] == pytest.approx([1, 1, 1])
    _, terms = weights("icepop")
    metrics = loss_metrics(
        {k: float(v) for k, v in terms.sums.items()}, {k: float(v) for k, v in terms.maxima.items()}
    )
    assert metrics["importance_weight_bounded"] == pytest.approx(2 / 3)
    assert metrics["importance_weight"] == pytest.approx(5.25 / 3)
    assert metrics["importance_weight_max"] == pytest.approx(4)
    assert metrics["importance_effective_share"] == pytest.approx(5.25**2 / (3 * 17.0625))
    assert metrics["mismatch_k1"] == pytest.approx(0, abs=1e-12)
    assert metrics["mismatch_kl"] == pytest.approx((3 - math.log(4) - 0.75 + math.log(4)) / 3)
    assert metrics["mismatch_abs_diff_max"] == pytest.approx(math.log(4))


def test_metrics_have_definitions_and_update_kl_is_k3():
    batch = make_batch(2)
    terms = policy_loss_terms(**batch, config=LossConfig(kl_coef=0.1, entropy_coef=0.1))
    metrics = loss_metrics(
        {k: float(v) for k, v in terms.sums.items()}, {k: float(v) for k, v in terms.maxima.items()}
    )
    assert set(metrics) == set(LOSS_METRICS)
    mask = batch["loss_mask"]
    log_r = (batch["logprobs"] - batch["old_logprobs"])[mask]
    assert metrics["update_kl"] == pytest.approx(float((log_r.exp() - 1 - log_r).mean()))
    assert metrics["ratio"] == pytest.approx(float(log_r.exp().mean()))
    assert metrics["num_loss_rows"] == float(mask.any(1).sum())
    assert metrics["entropy"] == pytest.approx(float(batch["entropy"][mask].mean()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs_are_summed_in_float32(dtype):
    terms = policy_loss_terms(**make_batch(3, dtype=dtype), config=LossConfig(kl_coef=0.1))
    assert terms.token_loss.dtype == torch.float32
    assert bool(torch.isfinite(terms.token_loss).all())


@pytest.mark.parametrize("objective", ["ppo_clip", "gspo", "cispo"])
def test_extreme_ratios_stay_finite(objective):
    x = torch.tensor([[-200.0, 0.0, -1.0]], requires_grad=True)
    old = torch.tensor([[0.0, -200.0, -math.inf]])
    mask = torch.tensor([[True, True, False]])
    config = LossConfig(objective=objective, kl_coef=0.1, dual_clip=None)
    terms = policy_loss_terms(x, old, torch.tensor([-1.0]), mask, config, ref_logprobs=old)
    terms.token_loss.sum().backward()
    assert bool(torch.isfinite(terms.token_loss).all())
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())
    assert float(x.grad[0, 2]) == 0


def test_empty_batch_and_all_masked():
    for rows in (0, 2):
        zeros = torch.zeros(rows, 3)
        terms = policy_loss_terms(
            zeros, zeros, torch.zeros(rows), torch.zeros(rows, 3, dtype=torch.bool), LossConfig()
        )
        assert float(terms.token_loss.sum()) == 0
        assert float(terms.sums["num_loss_tokens"]) == 0


def test_absent_inputs_are_named_with_the_key_that_needs_them():
    x = torch.zeros(2, 3)
    mask = torch.ones(2, 3, dtype=torch.bool)
    config = LossConfig(
        kl_coef=0.1,
        entropy_coef=0.1,
        mismatch={"correction": "icepop"},  # pyright: ignore
    )
    with pytest.raises(InputError) as error:
        policy_loss_terms(x, None, torch.zeros(2), mask, config)
    assert error.value.problems == [
        "loss.old_logprobs 'recompute' needs old_logprobs, and none was given",
        "loss.kl_coef > 0 needs ref_logprobs, and none was given",
        "loss.mismatch.correction 'icepop' needs rollout_logprobs, and none was given",
        "loss.entropy_coef > 0 needs entropy, and none was given",
    ]
    with pytest.raises(
        InputError, match=r"old_logprobs must be \(2, 3\) as loss_mask, got \(2, 2\)"
    ):
        policy_loss_terms(x, torch.zeros(2, 2), torch.zeros(2), mask, LossConfig())
    with pytest.raises(InputError, match=r"advantages must be \[2\] or \[2, 3\], got \(3,\)"):
        policy_loss_terms(x, x, torch.zeros(3), mask, LossConfig())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"clip_eps_low": 1.5}, "clip_eps_low"),
        ({"clip_eps_high": -0.1}, "clip_eps_high"),
        ({"dual_clip": 0.5}, "dual_clip"),
        ({"dual_clip": 3.0, "objective": "gspo"}, "belongs to objective 'ppo_clip'"),
        ({"aggregation": "mean"}, "'token_mean', 'sequence_mean' or 'fixed_length'"),
        ({"kl_estimator": "k2", "kl_gradient": "unbiased"}, "needs kl_estimator k1 or k3"),
        ({"old_logprobs": "rollout", "mismatch": {"correction": "icepop"}}, "count twice"),
        (
            {"mismatch": {"correction": "icepop", "max_importance_weight": 0.4}},
            "must be below max_importance_weight",
        ),
        ({"mismatch": {"correction": "tis"}}, "'token_truncate'"),
    ],
)
def test_bad_config_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**keys)
