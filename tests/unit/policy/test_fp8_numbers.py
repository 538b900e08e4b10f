"""FP8 numbers by hand: rounding, scales, the product and its gradients.

Layouts are in tests/distributed/test_fp8.py. Not covered: GPUs, whose kernels no test here reaches.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gdpo_megatron.policy.fp8 import (
    ALIGNMENT,
    E4M3,
    E5M2,
    Fp8Tensor,
    amaxes,
    quantize,
    scale_of,
    scaled_matmul,
)

ONE = torch.tensor(1.0)


def as_numbers(x: Fp8Tensor) -> Tensor:
    return x.values.double() * x.inverse_scale.double()


def rounded(values: list[float], dtype: torch.dtype, amax: float | None = None) -> list[float]:
    """Values after the way to 8 bits and back, in a matrix of one row."""
    x = torch.tensor([values])
    top = x.abs().amax() if amax is None else torch.tensor(amax)
    return as_numbers(quantize(x, dtype, top))[0].tolist()


def test_what_the_formats_hold() -> None:
    assert (torch.finfo(E4M3).max, torch.finfo(E5M2).max) == (448.0, 57344.0)


def test_rounding_by_hand() -> None:
    """amax 448 makes the scale of e4m3 1. Between 16 and 32 its numbers are 2 apart, e5m2's 4."""
    assert rounded([448.0, 17.0, 18.9, 19.0, -21.0, 0.0], E4M3) == [448, 16, 18, 20, -20, 0]
    assert rounded([57344.0, 17.0, 18.0, 18.1, -22.5], E5M2) == [57344, 16, 16, 20, -24]
    # The smallest numbers of e4m3 are multiples of 2**-9; half of it goes to even, to 0.
    assert rounded([448.0, 2.0**-9, 2.0**-10, 1.1 * 2.0**-10], E4M3) == [448, 2**-9, 0, 2**-9]


def test_scale_by_hand() -> None:
    """The largest value becomes the format's largest."""
    amax = torch.tensor([448.0, 3.5, 0.007])
    assert scale_of(amax, E4M3).tolist() == pytest.approx([1, 128, 64000])
    assert scale_of(amax, E5M2).tolist() == pytest.approx([128, 16384, 8192000])
    q = quantize(torch.tensor([[3.5, -1.75, 0.875]]), E4M3, torch.tensor(3.5))
    assert q.values.tolist() == [[448, -224, 112]]
    assert q.inverse_scale.item() == 1 / 128


@pytest.mark.parametrize(("dtype", "largest"), [(E4M3, 448.0), (E5M2, 57344.0)])
def test_values_above_amax_saturate(dtype: torch.dtype, largest: float) -> None:
    """Torch's own conversion makes infinity of them in e5m2."""
    values = rounded([1e30, -70000.0, 65504.0, 1.0], dtype, amax=largest)
    assert values == [largest, -largest, largest, 1.0]


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_zeros(dtype: torch.dtype) -> None:
    q = quantize(torch.zeros(2, 16), dtype, ONE * 0)
    assert math.isfinite(q.inverse_scale.item()) and as_numbers(q).abs().max() == 0
    y = scaled_matmul(q, quantize(torch.full((16, 16), 1e30), E4M3, ONE * 1e30).t(), torch.float32)
    assert y.tolist() == [[0.0] * 16] * 2


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e-8, 3e38])
def test_every_size_is_finite(dtype: torch.dtype, size: float) -> None:
    """Neither the scale nor its inverse overflows; up to 1e-30 nothing is lost."""
    x = torch.full((1, 16), size)
    q = quantize(x, dtype, x.amax())
    assert math.isfinite(q.inverse_scale.item()) and bool(q.values.float().isfinite().all())
    if size >= 1e-30:
        torch.testing.assert_close(as_numbers(q), x.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_not_hidden(dtype: torch.dtype, bad: float) -> None:
    x = torch.ones(2, 16)
    x[1, 3] = bad
    (amax,) = amaxes(x, group=None)
    assert not math.isfinite(amax)
    y = scaled_matmul(
        quantize(x, dtype, amax),
        quantize(torch.ones(16, 16), E4M3, ONE).t(),
        torch.float32,
    )
    assert bool(y[1].isnan().all())
    # Also where another rank's finite maximum has won: the value itself is NaN.
    if math.isnan(bad):
        assert bool(quantize(x, dtype, ONE).values[1, 3].isnan())


def test_amax_is_of_all_dtypes_in_float32() -> None:
    x, y = torch.tensor([[-3.0, 2.0]]), torch.tensor([0.5, -0.25], dtype=torch.bfloat16)
    both = amaxes(x, y, group=None)
    assert both.dtype == torch.float32 and both.tolist() == [3.0, 0.5]


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("first", "second"), [(E4M3, E4M3), (E5M2, E4M3)])
def test_product(first: torch.dtype, second: torch.dtype, out_dtype: torch.dtype) -> None:
    """That of what the operands stand for, but for the result's own rounding."""
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(7, 48, generator=generator), torch.randn(32, 48, generator=generator)
    qa, qb = quantize(a, first, a.abs().amax()), quantize(b, second, b.abs().amax())
    exact = as_numbers(qa) @ as_numbers(qb).t()
    y = scaled_matmul(qa, qb.t(), out_dtype)
    assert y.dtype == out_dtype and y.shape == (7, 32)
    bound = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}[out_dtype]
    # Relative to the sum of what is added, which is what rounding is relative to.
    size = as_numbers(qa).abs() @ as_numbers(qb).abs().t()
    assert float(((y.double() - exact).abs() / size).max()) < bound


def test_padding_and_transposing_change_no_value() -> None:
    x = torch.arange(1.0, 36.0).view(7, 5)
    q = quantize(x, E4M3, x.amax())
    padded = q.pad_rows()
    assert padded.values.shape == (ALIGNMENT, 5)
    assert torch.equal(as_numbers(padded)[:7], as_numbers(q)) and not as_numbers(padded)[7:].any()
    assert torch.equal(as_numbers(q.transposed()), as_numbers(q).t())
    assert q.transposed().values.is_contiguous()
    whole = quantize(torch.ones(32, 4), E4M3, ONE)
    assert whole.pad_rows() is whole


def matrix(rows: int, columns: int, dtype: torch.dtype = E4M3) -> Fp8Tensor:
    return quantize(torch.ones(rows, columns), dtype, ONE)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (matrix(16, 24), matrix(16, 24).t()),  # 24 is summed over
        (matrix(16, 16), matrix(24, 16).t()),  # 24 results
        (matrix(16, 16), matrix(16, 16)),  # row-major
        (matrix(16, 16).t(), matrix(16, 16).t()),  # column-major
        (matrix(16, 16, E5M2), matrix(16, 16, E5M2).t()),
    ],
    ids=["k", "n", "second operand", "first operand", "e5m2 twice"],
)
def test_what_gpu_kernels_refuse_is_refused_here(a: Fp8Tensor, b: Fp8Tensor) -> None:
    """torch's CPU product takes all of these."""
    torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        a.values, b.values, scale_a=ONE, scale_b=ONE, out_dtype=torch.float32
    )
    with pytest.raises(AssertionError):
        scaled_matmul(a, b, torch.float32)
