"""Matrix products of decoding: few rows, large weights.

torch multiplies float32 on CPUs with MKL, which does not use the widest instructions of every
maker's processors. oneDNN, which torch brings along, does: with 32 rows it took about half the
time on an AMD processor with AVX-512. Weights stay as they are, nothing is packed or copied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_MIN_WEIGHTS = 1 << 16  # below, the call itself costs more than is gained


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` without gradients; equal up to the rounding of its sums.

    Which way is taken depends on the weight alone, so that a row's result does not depend on the
    rows beside it.

    Args:
        x: [..., in].
        weight: [out, in].
        bias: [out] or None.
    """
    if (
        weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.numel() >= _MIN_WEIGHTS
        and torch.backends.mkldnn.is_available()
    ):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
