"""Which rows share a rank and a micro-batch: budgets are kept, no row is lost, costs are even."""

from __future__ import annotations

from itertools import chain, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdpo_megatron.data.micro_batching import MicroBatching, assign_rows, sequence_cost

costs = st.lists(st.floats(0, 1e6), max_size=20)
lengths_of_rows = st.lists(st.integers(1, 40), max_size=24)


def test_cost_of_a_sequence():
    # 12 h tokens of attention cost as much as the matrix products.
    assert sequence_cost(10, hidden_size=1) == pytest.approx(10 * (1 + 10 / 12))
    assert sequence_cost(1536, hidden_size=128) == 2 * 1536
    assert sequence_cost(0, hidden_size=128) == 0


def test_assignment_by_hand():
    # 5 -> rank 0, 4 -> 1, 3 -> 1 (load 7), 3 -> 0 (load 8), 3 -> 1 (load 10): the textbook case
    # in which the greedy way is not the best one (9 and 9).
    assert assign_rows([3.0, 5.0, 3.0, 4.0, 3.0], 2) == [[1, 2], [0, 3, 4]]
    assert assign_rows([1.0, 1.0, 1.0, 1.0], 2) == [[0, 2], [1, 3]]
    assert assign_rows([2.0], 3) == [[0], [], []]
    assert assign_rows([], 2) == [[], []]
    assert assign_rows([0.0, 0.0, 0.0], 2) == [[0, 1, 2], []]


@given(costs=costs, num_ranks=st.integers(1, 6))
def test_assignment_is_complete_and_balanced(costs: list[float], num_ranks: int):
    ranks = assign_rows(costs, num_ranks)
    assert sorted(chain.from_iterable(ranks)) == list(range(len(costs)))
    loads = [sum(costs[row] for row in rows) for rows in ranks]
    # The last row put on the fullest rank found it the least loaded one.
    assert max(loads) <= sum(costs) / num_ranks + max(costs, default=0) + 1e-6


@settings(max_examples=30)
@given(costs=st.lists(st.integers(1, 20), min_size=1, max_size=7), num_ranks=st.integers(2, 3))
def test_assignment_is_within_grahams_bound(costs: list[int], num_ranks: int):
    best = min(
        max(sum(c for c, r in zip(costs, choice, strict=True) if r == k) for k in range(num_ranks))
        for choice in product(range(num_ranks), repeat=len(costs))
    )
    ranks = assign_rows(costs, num_ranks)
    largest = max(sum(costs[row] for row in rows) for rows in ranks)
    assert largest <= (4 / 3 - 1 / (3 * num_ranks)) * best + 1e-9


def _width(rows: list[int], lengths: list[int], multiple: int) -> int:
    longest = max(max(1, lengths[row] - 1) for row in rows)
    return -(-longest // multiple) * multiple


def test_fixed_number_of_rows_by_hand():
    # Sorted by length: rows 3 (9), 0 (7), 2 (7), 4 (3), 1 (1).
    assert MicroBatching(micro_batch_size=2).groups([7, 1, 7, 9, 3]) == [[3, 0], [2, 4], [1]]
    assert MicroBatching(micro_batch_size=9).groups([7, 1, 7, 9, 3]) == [[3, 0, 2, 4, 1]]
    assert MicroBatching(micro_batch_size=2).groups([]) == []


def test_budget_by_hand():
    # Rows take 10, 9, 5, 4, 4 and 1 positions (one less than their tokens).
    lengths = [5, 11, 10, 6, 5, 2]
    # 2 x 10 fit into 20; then 4 x 5.
    twenty = MicroBatching(micro_batch_size=9, max_tokens=20)
    assert twenty.groups(lengths) == [[1, 2], [3, 0, 4, 5]]
    # Within 15 it takes four, and three rows of 5 would fit; of 10, 9, 10 and 8 none waits.
    fifteen = MicroBatching(micro_batch_size=9, max_tokens=15)
    assert fifteen.groups(lengths) == [[1], [2], [3, 0], [4, 5]]
    # Of 8 rows of 5, seven fit into 35: four and four take as many micro-batches as seven and one.
    even = MicroBatching(micro_batch_size=9, max_tokens=35).groups([6] * 8)
    assert even == [[0, 1, 2, 3], [4, 5, 6, 7]]
    # Padding to 8 counts: 16 + 16.
    padded = MicroBatching(micro_batch_size=9, max_tokens=32, pad_to_multiple_of=8)
    assert padded.groups([10, 11, 12]) == [[2, 1], [0]]
    # A row above the budget has a micro-batch of its own.
    assert MicroBatching(micro_batch_size=9, max_tokens=4).groups([3, 9, 3]) == [[1], [0, 2]]
    # One shape for all: what fits beside the longest, 10.
    same = MicroBatching(micro_batch_size=9, max_tokens=20, same_shape=True)
    assert same.groups(lengths) == [[1, 2], [3, 0], [4, 5]]


def test_packing_by_hand():
    lengths = [5, 11, 10, 6, 5, 2]  # 4, 10, 9, 5, 4 and 1 positions: 33
    packs = MicroBatching(micro_batch_size=9, max_tokens=20, packing=True).groups(lengths)
    assert packs == [[1, 0, 4], [2, 3, 5]]  # 10 + 4 + 4 and 9 + 5 + 1
    # By number of rows: the same two packs of three, or three of two (13, 11 and 9).
    assert MicroBatching(micro_batch_size=3, packing=True).groups(lengths) == packs
    pairs = MicroBatching(micro_batch_size=2, packing=True).groups(lengths)
    assert pairs == [[2, 4], [1, 5], [3, 0]]
    # 18 is a multiple of 6, 20 is not: 2 x 9 fit, 9 + 9 + 1 do not.
    six = MicroBatching(micro_batch_size=9, max_tokens=20, packing=True, pad_to_multiple_of=6)
    assert sorted(map(sorted, six.groups([10, 10, 2]))) == [[0, 2], [1]]
    # A row above the budget has a pack of its own, first.
    long = MicroBatching(micro_batch_size=9, max_tokens=4, packing=True)
    assert long.groups([3, 9, 3]) == [[1], [0, 2]]


@given(
    lengths=lengths_of_rows,
    max_tokens=st.integers(1, 120),
    multiple=st.sampled_from([1, 2, 4]),
    hidden_size=st.none() | st.integers(1, 8),
)
def test_padded_groups_keep_the_budget_and_are_the_fewest(
    lengths: list[int], max_tokens: int, multiple: int, hidden_size: int | None
):
    groups = MicroBatching(
        micro_batch_size=1,
        max_tokens=max_tokens,
        pad_to_multiple_of=multiple,
        hidden_size=hidden_size,
    ).groups(lengths)
    assert sorted(chain.from_iterable(groups)) == list(range(len(lengths)))
    widths = [_width(rows, lengths, multiple) for rows in groups]
    assert widths == sorted(widths, reverse=True)
    for rows, width in zip(groups, widths, strict=True):
        assert len(rows) * width <= max_tokens or len(rows) == 1
    # Fewest: filling each micro-batch from the longest row on.
    order, fewest = sorted(_width([r], lengths, multiple) for r in range(len(lengths)))[::-1], 0
    while order:
        fewest += 1
        order = order[max(1, max_tokens // order[0]) :]
    assert len(groups) == fewest


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    max_tokens=st.integers(12, 40),
)
def test_padded_groups_are_as_even_as_can_be(lengths: list[int], max_tokens: int):
    """Against every way to cut the sorted rows into as many groups."""
    batching = MicroBatching(micro_batch_size=1, max_tokens=max_tokens, hidden_size=3)
    groups = batching.groups(lengths)

    def largest(of: list[list[int]]) -> float:
        return max(len(g) * sequence_cost(_width(g, lengths, 1), 3) for g in of)

    order, best = sorted(range(len(lengths)), key=lambda r: -lengths[r]), float("inf")
    for borders in product([False, True], repeat=len(order) - 1):
        cut = [[order[0]]]
        for row, border in zip(order[1:], borders, strict=True):
            cut.append([row]) if border else cut[-1].append(row)
        fits = all(len(g) * _width(g, lengths, 1) <= max_tokens for g in cut)
        if fits and len(cut) == len(groups):
            best = min(best, largest(cut))
    assert largest(groups) <= best * (1 + 1e-6)


@given(
    lengths=lengths_of_rows,
    max_tokens=st.none() | st.integers(1, 120),
    micro_batch_size=st.integers(1, 5),
    multiple=st.sampled_from([1, 2, 4]),
)
def test_packs_keep_the_budget_and_are_even(
    lengths: list[int], max_tokens: int | None, micro_batch_size: int, multiple: int
):
    packs = MicroBatching(
        micro_batch_size=micro_batch_size,
        max_tokens=max_tokens,
        packing=True,
        pad_to_multiple_of=multiple,
    ).groups(lengths)
    assert sorted(chain.from_iterable(packs)) == list(range(len(lengths)))
    positions = [max(1, length - 1) for length in lengths]
    loads = [sum(positions[row] for row in pack) for pack in packs]
    assert loads == sorted(loads, reverse=True)
    if max_tokens is None:
        assert len(packs) == -(-len(lengths) // micro_batch_size)
        assert all(len(pack) <= micro_batch_size for pack in packs)
        return
    for pack, load in zip(packs, loads, strict=True):
        assert -(-load // multiple) * multiple <= max_tokens or len(pack) == 1
    # Rows that share a pack are spread: no two packs of the fewest would fit into one.
    capacity = max_tokens // multiple * multiple
    small = [n for n in positions if n <= capacity]
    if small:
        assert len(packs) <= (len(positions) - len(small)) + max(1, 2 * sum(small) // capacity + 1)


def test_ranks_that_share_experts_run_equally_many():
    free = MicroBatching(micro_batch_size=2)
    tied = MicroBatching(micro_batch_size=2, same_number=True)
    peers = [[3], [3] * 7, []]
    assert [free.num_micro_batches(own, peers) for own in peers] == [1, 4, 1]
    assert [tied.num_micro_batches(own, peers) for own in peers] == [4, 4, 4]


def test_thousands_of_rows_are_grouped_at_once():
    lengths = [1 + (37 * i) % 2000 for i in range(4000)]
    for packing in (False, True):
        groups = MicroBatching(
            micro_batch_size=1, max_tokens=8192, packing=packing, hidden_size=1024
        ).groups(lengths)
        assert sorted(chain.from_iterable(groups)) == list(range(4000))
        positions = sum(max(1, length - 1) for length in lengths)
        if packing:  # a pack is nearly full
            assert len(groups) <= 1.02 * positions / 8192 + 1
