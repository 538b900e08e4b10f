"""logprobs_and_entropy on whole logits, against float64 log_softmax and its autograd gradient.

The vocabulary cut over ranks is in tests/distributed/test_logprobs_on_ranks.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gdpo_megatron.policy.logprobs import logprobs_and_entropy


def exact(
    logits: Tensor, targets: Tensor, temperature: float, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy) in float64, differentiable."""
    log_p = (logits.double()[..., :vocab_size] / temperature).log_softmax(-1)
    return log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def gradients(
    logits: Tensor, targets: Tensor, weights: Tensor, temperature: float, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Gradient of a weighted sum of both results, ours and the exact one (float64)."""
    ours = logits.clone().requires_grad_()
    logprobs, entropy = logprobs_and_entropy(
        ours, targets, temperature=temperature, vocab_size=vocab_size, group=None
    )
    (weights[0] * logprobs + weights[1] * entropy).sum().backward()
    assert ours.grad is not None
    reference = logits.double().requires_grad_()
    logprobs, entropy = exact(reference, targets, temperature, vocab_size)
    (weights[0].double() * logprobs + weights[1].double() * entropy).sum().backward()
    assert reference.grad is not None
    return ours.grad, reference.grad


def sample(shape: tuple[int, ...], vocab_size: int, padded: int, scale: float = 3.0):
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(*shape, padded, generator=generator) * scale
    targets = torch.randint(vocab_size, shape, generator=generator)
    weights = torch.randn(2, *shape, generator=generator)
    return logits, targets, weights


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("shape", "vocab_size", "padded"), [((3, 7), 151, 192), ((11,), 64, 64)])
def test_values_and_gradient(shape, vocab_size: int, padded: int, temperature: float) -> None:
    logits, targets, weights = sample(shape, vocab_size, padded)
    before = logits.clone()
    logprobs, entropy = logprobs_and_entropy(
        logits, targets, temperature=temperature, vocab_size=vocab_size, group=None
    )
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert logprobs.shape == entropy.shape == shape
    assert torch.equal(logits, before), "the logits are the caller's"
    expected = exact(logits, targets, temperature, vocab_size)
    torch.testing.assert_close(logprobs.double(), expected[0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=2e-6, atol=2e-6)
    ours, reference = gradients(logits, targets, weights, temperature, vocab_size)
    torch.testing.assert_close(ours.double(), reference, rtol=0, atol=2e-6 / temperature)


@pytest.mark.parametrize("which", [0, 1], ids=["logprobs", "entropy"])
def test_gradient_of_one_result(which: int) -> None:
    """The other one takes no part: its gradient does not arrive."""
    logits, targets, weights = sample((2, 5), 30, 32)
    ours = logits.clone().requires_grad_()
    result = logprobs_and_entropy(ours, targets, temperature=0.7, vocab_size=30, group=None)[which]
    (weights[which] * result).sum().backward()
    reference = logits.double().requires_grad_()
    (weights[which] * exact(reference, targets, 0.7, 30)[which]).sum().backward()
    assert ours.grad is not None and reference.grad is not None
    torch.testing.assert_close(ours.grad.double(), reference.grad, rtol=0, atol=2e-6)


def test_by_hand() -> None:
    """p = (1/4, 3/4): log p = ln 3/4, H = 2 ln 2 - 3/4 ln 3; gradients from the definitions."""
    logits = torch.tensor([[0.0, math.log(3.0)]], requires_grad=True)
    logprobs, entropy = logprobs_and_entropy(
        logits, torch.tensor([1]), temperature=1.0, vocab_size=2, group=None
    )
    assert logprobs.item() == pytest.approx(math.log(0.75), abs=1e-7)
    assert entropy.item() == pytest.approx(2 * math.log(2) - 0.75 * math.log(3), abs=1e-7)
    (by_logprob,) = torch.autograd.grad(logprobs.sum(), logits, retain_graph=True)
    torch.testing.assert_close(by_logprob, torch.tensor([[-0.25, 0.25]]), rtol=0, atol=1e-7)
    (by_entropy,) = torch.autograd.grad(entropy.sum(), logits)
    slope = 3 / 16 * math.log(3)  # -p_0 (log p_0 + H)
    torch.testing.assert_close(by_entropy, torch.tensor([[slope, -slope]]), rtol=0, atol=1e-7)


def test_gradient_by_finite_differences() -> None:
    """Central differences of the function itself, at a step where float32 still resolves them."""
    logits, targets, weights = sample((1,), 5, 8, scale=1.0)

    def objective(x: Tensor) -> float:
        logprobs, entropy = logprobs_and_entropy(
            x, targets, temperature=0.8, vocab_size=5, group=None
        )
        return float((weights[0] * logprobs + weights[1] * entropy).double().sum())

    ours, _ = gradients(logits, targets, weights, 0.8, 5)
    for column in range(8):
        step = torch.zeros_like(logits)
        step[0, column] = 2**-7
        slope = (objective(logits + step) - objective(logits - step)) / 2**-6
        assert slope == pytest.approx(ours[0, column].item(), abs=2e-4)


@pytest.mark.parametrize("filling", [1e9, float("inf"), float("nan")])
def test_padding_has_no_part(filling: float) -> None:
    """Columns from vocab_size on change nothing, whatever they hold, and get gradient 0."""
    logits, targets, weights = sample((4,), 30, 64)
    logits[:, 30:] = filling
    results = logprobs_and_entropy(logits, targets, temperature=0.9, vocab_size=30, group=None)
    alone = logprobs_and_entropy(
        logits[:, :30], targets, temperature=0.9, vocab_size=30, group=None
    )
    torch.testing.assert_close(results, alone, rtol=0, atol=1e-6)  # another width, another order
    ours, _ = gradients(logits, targets, weights, 0.9, 30)
    assert (ours[:, 30:] == 0).all()
    assert ours[:, :30].isfinite().all() and (ours[:, :30] != 0).any()


def test_bfloat16_logits() -> None:
    """Values are those of the rounded logits, exact to float32; only the gradient is rounded."""
    logits, targets, weights = sample((6, 9), 151, 192)
    rounded = logits.bfloat16()
    logprobs, entropy = logprobs_and_entropy(
        rounded, targets, temperature=0.7, vocab_size=151, group=None
    )
    assert logprobs.dtype == entropy.dtype == torch.float32
    expected = exact(rounded, targets, 0.7, 151)
    torch.testing.assert_close(logprobs.double(), expected[0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=2e-6, atol=2e-6)
    ours, reference = gradients(rounded, targets, weights, 0.7, 151)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), reference, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.01])
def test_extreme_logits(temperature: float) -> None:
    """Logits of +-1e4: certain, impossible and tied tokens; no NaN, and the exact limits."""
    logits = torch.tensor([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0], [1e4, 1e4, -1e4]])
    targets = torch.tensor([0, 1, 1])
    logprobs, entropy = logprobs_and_entropy(
        logits, targets, temperature=temperature, vocab_size=3, group=None
    )
    gap = 2e4 / temperature
    assert logprobs.tolist() == pytest.approx([0.0, -gap, -math.log(2)], rel=1e-6)
    assert entropy.tolist() == pytest.approx([0.0, 0.0, math.log(2)], abs=1e-6)
    ours, _ = gradients(logits, targets, torch.ones(2, 3), temperature, 3)
    expected = torch.tensor([[0.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [-0.5, 0.5, 0.0]]) / temperature
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_no_gradient_where_none_is_asked() -> None:
    """Masked tokens, whose weight is 0, leave no trace."""
    logits, targets, weights = sample((2, 6), 30, 32)
    weights[:, :, 3:] = 0
    ours, _ = gradients(logits, targets, weights, 1.0, 30)
    assert (ours[:, 3:] == 0).all() and (ours[:, :3] != 0).any()
