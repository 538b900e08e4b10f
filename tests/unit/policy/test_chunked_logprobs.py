"""Log-probs in chunks of tokens against float64, and how many logits exist meanwhile.

The vocabulary cut over ranks is in tests/distributed/test_memory.py (TP2, with and without
sequence parallelism).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gdpo_megatron.policy.logprobs import chunked_logprobs_and_entropy

NUM_TOKENS, HIDDEN, VOCABULARY, PADDED = 23, 16, 151, 192


def given(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden, weight, targets, weights of log-prob and entropy)."""
    generator = torch.Generator().manual_seed(8)
    hidden = torch.randn(NUM_TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(PADDED, HIDDEN, generator=generator)
    targets = torch.randint(VOCABULARY, (NUM_TOKENS,), generator=generator)
    weights = torch.randn(2, NUM_TOKENS, generator=generator)
    return hidden.to(dtype), weight.to(dtype), targets, weights


def ours(
    chunk_tokens: int, dtype: torch.dtype = torch.float32, *, frozen: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(logprobs, entropy, gradient of hidden, gradient of weight)."""
    hidden, weight, targets, weights = given(dtype)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    logprobs, entropy = chunked_logprobs_and_entropy(
        hidden,
        weight,
        targets,
        chunk_tokens=chunk_tokens,
        temperature=0.7,
        vocab_size=VOCABULARY,
        group=None,
    )
    (weights[0] * logprobs + weights[1] * entropy).sum().backward()
    return logprobs.detach(), entropy.detach(), hidden.grad, weight.grad


def exact(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    hidden, weight, targets, weights = given(dtype)
    hidden, weight = (x.double().requires_grad_() for x in (hidden, weight))
    log_p = ((hidden @ weight.T)[:, :VOCABULARY] / 0.7).log_softmax(-1)
    logprobs = log_p.gather(-1, targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    (weights[0].double() * logprobs + weights[1].double() * entropy).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return logprobs.detach(), entropy.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("chunk_tokens", [1, 7, 22, 23, 1000])
def test_values_and_gradients(chunk_tokens: int) -> None:
    for mine, right in zip(ours(chunk_tokens), exact(), strict=True):
        assert mine is not None and mine.dtype == torch.float32
        apart = float((mine.double() - right).abs().max() / right.abs().max())
        assert apart < 2e-6  # measured 5e-7


def test_padding_gets_no_gradient() -> None:
    _, _, _, grad = ours(7)
    assert grad is not None
    assert (grad[VOCABULARY:] == 0).all() and (grad[:VOCABULARY] != 0).any(1).all()


def test_a_frozen_output_layer_gets_no_gradient() -> None:
    *_, hidden, weight = ours(7, frozen=True)
    assert weight is None and hidden is not None
    assert torch.equal(hidden, ours(7)[2])  # pyright: ignore[reportArgumentType]


def test_bfloat16_gradient_of_the_weight_is_rounded_chunk_by_chunk() -> None:
    """Not worse than the rounding of one product: chunks are summed in float32."""
    right = exact(torch.bfloat16)[3]
    for chunk_tokens in (2, 1000):
        grad = ours(chunk_tokens, torch.bfloat16)[3]
        assert grad is not None and grad.dtype == torch.bfloat16
        apart = float((grad.double() - right).abs().max() / right.abs().max())
        assert apart < 2**-6


class _Widest(TorchDispatchMode):
    """Most rows of any tensor as wide as the vocabulary that an operation returns."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x.ndim == 2 and x.shape[1] == PADDED:
                self.rows = max(self.rows, x.shape[0])
        return out


@pytest.mark.parametrize("chunk_tokens", [4, 1000])
def test_no_more_logits_than_asked(chunk_tokens: int) -> None:
    with _Widest() as seen:
        ours(chunk_tokens)
    # [h, V] is the weight, turned round.
    assert seen.rows == max(HIDDEN, min(chunk_tokens, NUM_TOKENS))
