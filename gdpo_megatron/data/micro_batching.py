"""Which rows share a rank, and on it a micro-batch.

Rows are first assigned to the data-parallel ranks so that all have about the same work, then cut
into micro-batches: so many rows each, or as many as a budget of tokens holds.

A micro-batch costs memory for the tokens that it computes and time for their products and
attention. A budget bounds the first; within it the rows are cut so that the second is about equal
for all micro-batches, because pipeline stages wait for the costliest one.

    padded    a micro-batch is as wide as its longest row: rows of similar length share one
    packed    rows lie end to end and cost what they are: any may share one

Nothing here communicates: every rank computes the same groups from the same lengths.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass


def sequence_cost(length: int, hidden_size: int) -> float:
    """Relative cost of one sequence through a transformer layer.

    The matrix products of a layer take about 24 h^2 operations a token, causal attention about
    2 h L: so L (1 + L / 12 h), in units of a token without attention.
    """
    return length * (1.0 + length / (12.0 * hidden_size))


def assign_rows(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Assign rows to data-parallel ranks so that the largest sum of costs is small.

    Greedy, costliest row first to the least loaded rank, which is within 4/3 of the optimum
    (Graham 1969). Ties go to the lower row and the lower rank, so all ranks agree.

    Args:
        costs: one per row, not negative.
        num_ranks: data-parallel ranks.

    Returns:
        Row indices of each rank, ascending. Sizes differ; a rank is empty when rows are few.
    """
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0.0, rank) for rank in range(num_ranks)]
    for row in sorted(range(len(costs)), key=lambda row: (-costs[row], row)):
        load, rank = loads[0]
        ranks[rank].append(row)
        heapq.heapreplace(loads, (load + costs[row], rank))
    return [sorted(rows) for rows in ranks]


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatching:
    """How the rows of a data-parallel rank are cut into micro-batches.

    Args:
        micro_batch_size: rows of a micro-batch at most, where there is no budget.
        max_tokens: the budget: tokens of a micro-batch, padding included. A row that is longer gets
            a micro-batch of its own. None: `micro_batch_size` counts.
        packing: rows lie end to end; else they are padded to the longest.
        pad_to_multiple_of: what the tokens of a row, of a pack where rows are packed, are padded to
            (see MegatronModel.length_multiple).
        same_shape: all micro-batches get the shape of the largest, whatever is in them.
        same_number: all data-parallel ranks need equally many micro-batches.
        hidden_size: of the model, for the cost of a row; None counts tokens alone.
    """

    micro_batch_size: int
    max_tokens: int | None = None
    packing: bool = False
    pad_to_multiple_of: int = 1
    same_shape: bool = False
    same_number: bool = False
    hidden_size: int | None = None

    def groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Cut rows into micro-batches, those of the longest rows or the highest cost first.

        Memory then peaks in the first one: a run that does not fit fails at once.

        Args:
            lengths: tokens of each row, prompt and completion.

        Returns:
            For each micro-batch its rows, longest first; every row is in one.
        """
        # A row of n tokens takes n - 1 positions; one token alone still takes one.
        positions = [max(1, length - 1) for length in lengths]
        order = sorted(range(len(positions)), key=lambda row: (-positions[row], row))
        if self.packing:
            return self._packed(order, positions)
        widths = [self._padded(n) for n in positions]
        if self.max_tokens is None:
            return _chunks(order, self.micro_batch_size)
        if self.same_shape:
            # Every micro-batch will be as wide as the longest row.
            widest = max(widths, default=1)
            return _chunks(order, max(1, self.max_tokens // widest))
        return self._within_budget(order, widths, self.max_tokens)

    def num_micro_batches(self, lengths: Sequence[int], peers: Sequence[Sequence[int]]) -> int:
        """Micro-batches that a data-parallel rank has to run; at least one.

        Args:
            lengths: tokens of each of its rows.
            peers: the same of each data-parallel rank, where they need the same number.
        """
        ranks = (lengths, *peers) if self.same_number else (lengths,)
        return max(1, *(len(self.groups(of_rank)) for of_rank in ranks))

    def _padded(self, length: int) -> int:
        return -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of

    def _cost(self, length: int) -> float:
        return sequence_cost(length, self.hidden_size) if self.hidden_size else float(length)

    def _within_budget(
        self, order: Sequence[int], widths: Sequence[int], max_tokens: int
    ) -> list[list[int]]:
        """Neighbours in length, as few groups as the budget allows, of costs as even as can be.

        Longest first, filling each group is the fewest: the longest row needs a group whose width
        is then given, and no rows serve it better than the next longest. So the lowest bound on
        the cost of a group that needs no more groups is found by bisection.
        """

        def cut(max_cost: float) -> list[list[int]]:
            groups: list[list[int]] = []
            for row in order:
                if groups:
                    size, width = len(groups[-1]) + 1, widths[groups[-1][0]]
                    if size * width <= max_tokens and size * self._cost(width) <= max_cost:
                        groups[-1].append(row)
                        continue
                groups.append([row])
            return groups

        fewest = cut(math.inf)
        low, high = 0.0, max((len(g) * self._cost(widths[g[0]]) for g in fewest), default=0.0)
        for _ in range(30):
            middle = (low + high) / 2
            if len(cut(middle)) > len(fewest):
                low = middle
            else:
                high = middle
        return cut(high)

    def _packed(self, order: Sequence[int], positions: Sequence[int]) -> list[list[int]]:
        """As few packs as are found to do, costs even: each row to the least loaded with room."""
        sizes, capacity = [1] * len(positions), self.micro_batch_size
        if self.max_tokens is not None:
            # What is padded to the multiple must stay within the budget too.
            capacity = self.max_tokens // self.pad_to_multiple_of * self.pad_to_multiple_of
            sizes = list(positions)
        groups = [[row] for row in order if sizes[row] > capacity]
        fitting = [row for row in order if sizes[row] <= capacity]
        costs = [self._cost(n) for n in positions]
        num_packs = -(-sum(sizes[row] for row in fitting) // capacity) if fitting else 0
        while (packs := _spread(fitting, sizes, costs, capacity, num_packs)) is None:
            num_packs += 1
        groups += packs
        return sorted(groups, key=lambda rows: -sum(costs[row] for row in rows))


def _chunks(rows: Sequence[int], size: int) -> list[list[int]]:
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def _spread(
    rows: Sequence[int],
    sizes: Sequence[int],
    costs: Sequence[float],
    capacity: int,
    num_packs: int,
) -> list[list[int]] | None:
    """Rows, in this order, each to the pack of lowest cost that has room; None if one has none."""
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    heap = [(0.0, pack, capacity) for pack in range(num_packs)]  # (cost, number, room)
    for row in rows:
        full: list[tuple[float, int, int]] = []
        while heap and heap[0][2] < sizes[row]:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, pack, room = heap[0]
        packs[pack].append(row)
        heapq.heapreplace(heap, (cost + costs[row], pack, room - sizes[row]))
        for entry in full:
            heapq.heappush(heap, entry)
    return packs
