"""Groups as segments: every statistic of a group without a Python loop.

Rows are put into one canonical order, sorted by group id and stable within a group, so that each
group is one contiguous segment. Segment reductions add the members of a group in that order,
whatever the number of threads, and a batch that was split and put together again gives the same
bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

# A sum that cancels to less than this share of its summands' magnitude is rounding, and means 0.
ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class Groups:
    """The partition of B sorted rows into P groups.

    Args:
        ids: [P] int64, ascending.
        sizes: [P] int64, all positive.
        index: [B] int64, the position in `ids` of each row's group; ascending.
    """

    ids: Tensor
    sizes: Tensor
    index: Tensor

    def reduce(self, values: Tensor, how: Literal["sum", "max", "min"]) -> Tensor:
        """Reduce float64 rows [B, ...] to groups [P, ...]."""
        if values.shape[0] == 0:
            return values.new_zeros((0, *values.shape[1:]))
        # unsafe: sizes add up to B by construction; the check would cost a pass.
        return torch.segment_reduce(values, how, lengths=self.sizes, axis=0, unsafe=True)

    def expand(self, per_group: Tensor, out: Tensor | None = None) -> Tensor:
        """Give each row its group's value: [P, ...] to [B, ...], into `out` if given."""
        return torch.index_select(per_group, 0, self.index, out=out)


def sort_into_groups(group_ids: Tensor) -> tuple[Groups, Tensor | None]:
    """Find the groups and the canonical order.

    Args:
        group_ids: [B] int64 in any order.

    Returns:
        The groups, and the rows in canonical order ([B] int64) or None if they already are.
    """
    order = None
    if bool((group_ids[1:] < group_ids[:-1]).any()):
        group_ids, order = torch.sort(group_ids, stable=True)
    ids, index, sizes = torch.unique_consecutive(group_ids, return_inverse=True, return_counts=True)
    return Groups(ids=ids, sizes=sizes, index=index), order


def total(values: Tensor) -> float:
    """Sum of a float64 vector; unlike torch.sum, the same for every number of threads."""
    return float(np.sum(values.numpy()))


def without_rounding(values: Tensor, magnitude: Tensor) -> Tensor:
    """Set to 0 what is only rounding beside the `magnitude` it was computed from."""
    return torch.where(values.abs() <= ROUNDING * magnitude, 0.0, values)
