"""Products of decoding are right, whichever library multiplies.

Not covered: other devices and number formats, where it is torch's own.
"""

from __future__ import annotations

import pytest
import torch

from gdpo_megatron.rollout.native.linear import linear


@pytest.mark.parametrize("shape", [(24, 64), (300, 256), (64, 2048)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_is_the_product_and_rows_are_independent(shape: tuple[int, int], with_bias: bool):
    torch.manual_seed(1)
    weight, x = torch.randn(shape), torch.randn(2, 17, shape[1])
    bias = torch.randn(shape[0]) if with_bias else None
    got = linear(x, weight, bias)
    expected = x.double() @ weight.double().T
    if bias is not None:
        expected += bias
    # Sums of n products of normal numbers have size sqrt(n); each rounds to 6e-8 of that.
    assert (got - expected).abs().max() < 1e-6 * shape[1] ** 0.5 * 5
    torch.testing.assert_close(linear(x[1, 3:5], weight, bias), got[1, 3:5], rtol=1e-5, atol=1e-5)


def test_a_slice_of_experts_and_a_weight_that_needs_gradients():
    torch.manual_seed(1)
    experts, x = torch.randn(3, 256, 256, requires_grad=True), torch.randn(5, 256)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, experts[1]), x @ experts[1].T, rtol=1e-4, atol=1e-4)
