"""Rows to ranks and micro-batches, and values there and back."""

from __future__ import annotations

from itertools import chain, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdpo_megatron.data.batching import (
    MicroBatch,
    TokenRow,
    assign_rows,
    collect_token_values,
    make_micro_batches,
    place_token_values,
    select_row_values,
    sequence_cost,
)

costs = st.lists(st.floats(0, 1e6), max_size=20)


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


def test_micro_batches_by_hand():
    rows: list[TokenRow] = [
        ([5], [6, 7]),
        ([1, 2, 3], [4, 0, 9]),
        ([8, 8], []),
    ]
    first, second = make_micro_batches(
        rows, micro_batch_size=2, pad_to_multiple_of=4, pad_token_id=9
    )
    assert first.row_ids.tolist() == [1, 0]  # longest first
    assert first.tokens.tolist() == [[1, 2, 3, 4, 0, 9, 9, 9], [5, 6, 9, 9, 9, 9, 9, 9]]
    assert first.labels.tolist() == [[2, 3, 4, 0, 9, 9, 9, 9], [6, 7, 9, 9, 9, 9, 9, 9]]
    # The completion's 9 is an end token that equals the padding: it counts, padding does not.
    assert first.loss_mask.int().tolist() == [[0, 0, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    assert first.position_ids.tolist() == [list(range(8))] * 2
    assert first.num_loss_tokens == 5
    # An aborted completion of no tokens is kept, without loss.
    assert second.row_ids.tolist() == [2]
    assert second.tokens.tolist() == [[8, 9, 9, 9]]
    assert second.num_loss_tokens == 0


token_rows = st.lists(
    st.tuples(
        st.lists(st.integers(0, 9), min_size=1, max_size=6),
        st.lists(st.integers(0, 9), max_size=6),
    ),
    max_size=12,
)


@given(
    rows=token_rows,
    micro_batch_size=st.integers(1, 5),
    multiple=st.sampled_from([1, 2, 8]),
    min_micro_batches=st.integers(0, 3),
)
def test_micro_batches_hold_every_row_once(
    rows: list[TokenRow], micro_batch_size: int, multiple: int, min_micro_batches: int
):
    micro_batches = make_micro_batches(
        rows,
        micro_batch_size=micro_batch_size,
        pad_to_multiple_of=multiple,
        min_micro_batches=min_micro_batches,
    )
    needed = -(-len(rows) // micro_batch_size)
    assert len(micro_batches) == max(needed, min_micro_batches)
    seen: list[int] = []
    for micro_batch in micro_batches:
        length = micro_batch.tokens.shape[1]
        assert length % multiple == 0
        longest = 1
        for slot, row_id in enumerate(micro_batch.row_ids.tolist()):
            mask = micro_batch.loss_mask[slot]
            if row_id == -1:
                assert not mask.any()
                continue
            seen.append(row_id)
            prompt, completion = rows[row_id]
            sequence, num_labels = [*prompt, *completion], len(prompt) + len(completion) - 1
            longest = max(longest, num_labels)
            # Label t is token t + 1, and the masked labels are the completion.
            assert micro_batch.tokens[slot, :num_labels].tolist() == sequence[:-1]
            assert micro_batch.labels[slot, :num_labels].tolist() == sequence[1:]
            assert micro_batch.labels[slot, mask].tolist() == list(completion)
        assert length - longest < multiple
    assert sorted(seen) == list(range(len(rows)))


@given(rows=token_rows, micro_batch_size=st.integers(1, 5))
def test_values_go_there_and_back(rows: list[TokenRow], micro_batch_size: int):
    micro_batches = make_micro_batches(
        rows, micro_batch_size=micro_batch_size, min_micro_batches=len(rows) + 1
    )
    # The value of a token names its row and place.
    values = [[100.0 * row + t for t in range(len(c))] for row, (_, c) in enumerate(rows)]
    placed = [place_token_values(values, mb, dtype=torch.float64) for mb in micro_batches]
    for tensor, micro_batch in zip(placed, micro_batches, strict=True):
        assert not tensor[~micro_batch.loss_mask].any()
    back = collect_token_values(placed, micro_batches, len(rows))
    assert [tensor.tolist() for tensor in back] == values


def test_row_values():
    rows: list[TokenRow] = [([1], [2]), ([1], [2, 3]), ([1, 1], [2, 3])]
    advantages = torch.tensor([0.5, -1.0, 2.0])
    first, second, filler = make_micro_batches(rows, micro_batch_size=2, min_micro_batches=3)
    assert select_row_values(advantages, first).tolist() == [2.0, -1.0]
    assert select_row_values(advantages, second).tolist() == [0.5]
    assert select_row_values(advantages, filler).tolist() == [0.0]
    assert select_row_values(torch.zeros(0), filler).tolist() == [0.0]
    assert advantages.tolist() == [0.5, -1.0, 2.0]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="row 1: the prompt has no tokens"):
        make_micro_batches([([1], [2]), ([], [2])], micro_batch_size=2)
    (micro_batch,) = make_micro_batches([([1], [2, 3])], micro_batch_size=2)
    with pytest.raises(ValueError, match="row 0: 1 values for 2 completion tokens"):
        place_token_values([[0.5]], micro_batch)
    with pytest.raises(ValueError, match=r"rows \[1\] are in no micro-batch"):
        collect_token_values([torch.zeros(1, 2)], [micro_batch], num_rows=2)
    with pytest.raises(ValueError, match="row 0 is in two"):
        collect_token_values([torch.zeros(1, 2)] * 2, [micro_batch] * 2, num_rows=1)
    good = {name: getattr(micro_batch, name) for name in MicroBatch.__slots__}
    with pytest.raises(ValueError, match=r"MicroBatch\.loss_mask must be torch\.bool \(1, 2\)"):
        MicroBatch(**good | {"loss_mask": torch.ones(1, 2)})
    with pytest.raises(ValueError, match=r"MicroBatch\.labels"):
        MicroBatch(**good | {"labels": torch.ones(1, 3, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"MicroBatch\.row_ids"):
        MicroBatch(**good | {"row_ids": torch.zeros(2, dtype=torch.int64)})


def test_to_moves_all_tensors():
    (micro_batch,) = make_micro_batches([([1], [2, 3])], micro_batch_size=2)
    moved = micro_batch.to("meta")
    assert all(getattr(moved, name).is_meta for name in MicroBatch.__slots__)
