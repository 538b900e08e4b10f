"""FP8 by tensor: how a tensor becomes 8 bits and a scale, and how two of them are multiplied.

    scale = largest value of the format / max |x|,   q = round(x * scale),   x ~ q / scale

e4m3 (largest value 448, 3 bits of fraction) holds what is multiplied forward, e5m2 (57344, 2 bits)
holds gradients, whose range is wider: the "hybrid" choice of Micikevicius et al. 2022, arXiv
2209.05433, section 3. The scale is that of the very tensor, so nothing is remembered from one pass
to the next.

`torch._scaled_mm` runs on CPU and on GPUs. On GPUs it asks for more; `scaled_matmul` asks for the
same everywhere, so that what was tested on a CPU is legal there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

ALIGNMENT = 16
"""What the kernels want the second operand's sizes to be multiples of."""

_SMALLEST_AMAX = 2.0**-110  # below it 57344 / amax is near to what float32 can hold


@dataclass(frozen=True, slots=True)
class Fp8Tensor:
    """A matrix in 8 bits; what it stands for is values * inverse_scale.

    Args:
        values: [m, n] of E4M3 or E5M2.
        inverse_scale: float32 scalar.
    """

    values: Tensor
    inverse_scale: Tensor

    def t(self) -> Fp8Tensor:
        """The transposed view: rows become columns, in memory too."""
        return Fp8Tensor(self.values.t(), self.inverse_scale)

    def transposed(self) -> Fp8Tensor:
        """The transposed matrix, row-major."""
        return Fp8Tensor(self.values.t().contiguous(), self.inverse_scale)

    def pad_rows(self) -> Fp8Tensor:
        """Rows of zeros added up to a multiple of ALIGNMENT."""
        missing = -len(self.values) % ALIGNMENT
        if not missing:
            return self
        # Padding is not implemented for 8-bit floats; a zero is the byte 0 in both formats.
        padded = F.pad(self.values.view(torch.uint8), (0, 0, 0, missing))
        return Fp8Tensor(padded.view(self.values.dtype), self.inverse_scale)


def amaxes(*tensors: Tensor, group: ProcessGroup | None) -> Tensor:
    """Largest absolute value of each tensor over a group, float32 [n].

    With tensor and context parallelism a rank has a part of a tensor: only the largest value of all
    parts gives the scale that a single process would choose.

    Args:
        tensors: not empty.
        group: ranks that share the tensors; None where this rank has them whole.
    """
    norms = [torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32) for x in tensors]
    largest = torch.stack(norms)
    if group is not None and group.size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest


def scale_of(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """What values are multiplied with to use the whole range of a format, float32.

    A tensor of zeros has some finite scale. One with infinity has the scale 0, which makes it NaN.
    """
    return torch.finfo(dtype).max / amax.clamp(min=_SMALLEST_AMAX)


def quantize(x: Tensor, dtype: torch.dtype, amax: Tensor) -> Fp8Tensor:
    """Round a matrix to 8 bits.

    Args:
        x: [m, n].
        dtype: E4M3 or E5M2.
        amax: largest absolute value of the whole tensor that `x` is a part of.

    Returns:
        The matrix in 8 bits. Values above amax become the largest one (e5m2 would make them
        infinite). NaN stays NaN, and infinity becomes NaN.
    """
    scale, largest = scale_of(amax, dtype), torch.finfo(dtype).max
    values = (x.float() * scale).clamp(-largest, largest).to(dtype)
    return Fp8Tensor(values, scale.reciprocal())


def scaled_matmul(a: Fp8Tensor, b: Fp8Tensor, out_dtype: torch.dtype) -> Tensor:
    """Product of two matrices in 8 bits, summed in float32.

    Args:
        a: [m, k], row-major.
        b: [k, n], column-major; k and n are multiples of ALIGNMENT.
        out_dtype: of the result.

    Returns:
        [m, n] of what the operands stand for.
    """
    k, n = b.values.shape
    assert a.values.is_contiguous() and b.values.t().is_contiguous(), "layout of operands"
    assert k % ALIGNMENT == 0 and n % ALIGNMENT == 0, f"{k} x {n} is not made of {ALIGNMENT}s"
    assert {a.values.dtype, b.values.dtype} != {E5M2}, "no kernel multiplies e5m2 with e5m2"
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        a.values,
        b.values,
        scale_a=a.inverse_scale,
        scale_b=b.inverse_scale,
        out_dtype=out_dtype,
        use_fast_accum=False,  # which sums in less than float32
    )
