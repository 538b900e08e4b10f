"""What the contract refuses, and that the loss terms use the policies its table names."""

from __future__ import annotations

import math

import pytest
import torch

from gdpo_megatron.algorithms import (
    logprob_problems,
    loss_metrics,
    needs_old_pass,
    needs_reference,
    policy_loss_terms,
)
from gdpo_megatron.config.loss import LossConfig

GOOD = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "num_minibatches_per_step": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "rollout.temperature is 0: greedy"),
        ({"top_p": 0.95}, "rollout.top_p is 0.95"),
        ({"top_k": 20}, "rollout.top_k is 20"),
    ],
)
def test_truncated_and_greedy_sampling_are_refused(change, message):
    problems = logprob_problems(LossConfig(), **{**GOOD, **change})
    assert len(problems) == 1
    assert message in problems[0]
    assert logprob_problems(LossConfig(), **{**GOOD, "temperature": 0.6}) == []


def test_skipping_the_old_pass_needs_one_minibatch():
    many = {**GOOD, "num_minibatches_per_step": 4}
    assert "one minibatch" in logprob_problems(LossConfig(old_logprobs="current"), **many)[0]
    assert logprob_problems(LossConfig(old_logprobs="rollout"), **many) == []
    assert logprob_problems(LossConfig(), **many) == []
    assert logprob_problems(LossConfig(old_logprobs="current"), **GOOD) == []


def test_passes_that_are_needed():
    assert needs_old_pass(LossConfig())
    assert not needs_old_pass(LossConfig(old_logprobs="current"))
    assert not needs_old_pass(LossConfig(old_logprobs="rollout"))
    assert needs_reference(LossConfig(kl_coef=0.1))
    assert not needs_reference(LossConfig())


def test_which_policy_each_term_uses():
    """log pi = ln 2 above old, ln 4 above the engine: ratio 2, 1 or 4; weight 2, 4 or 1."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    new = torch.tensor([[0.0]], dtype=torch.float64)
    old, rollout = new - math.log(2), new - math.log(4)
    expected = {"recompute": (2, 2), "current": (1, 4), "rollout": (4, 1)}
    for choice, (ratio, weight) in expected.items():
        terms = policy_loss_terms(
            new,
            old if choice == "recompute" else None,
            torch.tensor([1.0]),
            mask,
            LossConfig(old_logprobs=choice),
            rollout_logprobs=rollout,
        )
        metrics = loss_metrics(
            {k: float(v) for k, v in terms.sums.items()},
            {k: float(v) for k, v in terms.maxima.items()},
        )
        assert metrics["ratio"] == pytest.approx(ratio)
        assert metrics["importance_weight"] == pytest.approx(weight)


def test_current_equals_recompute_in_the_first_optimizer_step():
    """Where old is the policy itself, leaving the pass out changes neither value nor gradient."""
    g = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(3, 5, generator=g, dtype=torch.float64)
    advantages = torch.randn(3, generator=g, dtype=torch.float64)
    mask = torch.rand(3, 5, generator=g) > 0.2
    results = []
    for choice in ("recompute", "current"):
        x = logprobs.clone().requires_grad_()
        old = logprobs if choice == "recompute" else None
        terms = policy_loss_terms(x, old, advantages, mask, LossConfig(old_logprobs=choice))
        terms.token_loss.sum().backward()
        results.append((terms.token_loss.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
