"""Rows to tensors, and values there and back; which rows share one: test_micro_batching.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gdpo_megatron.data.batching import (
    MicroBatch,
    TokenRow,
    collect_token_values,
    make_micro_batches,
    place_token_values,
    select_row_values,
)
from gdpo_megatron.data.micro_batching import MicroBatching


def test_micro_batches_by_hand():
    rows: list[TokenRow] = [
        ([5], [6, 7]),
        ([1, 2, 3], [4, 0, 9]),
        ([8, 8], []),
    ]
    first, second = make_micro_batches(
        rows, MicroBatching(micro_batch_size=2, pad_to_multiple_of=4), pad_token_id=9
    )
    assert first.row_ids.tolist() == [1, 0]  # longest first
    assert first.tokens.tolist() == [[1, 2, 3, 4, 0, 9, 9, 9], [5, 6, 9, 9, 9, 9, 9, 9]]
    assert first.labels.tolist() == [[2, 3, 4, 0, 9, 9, 9, 9], [6, 7, 9, 9, 9, 9, 9, 9]]
    # The completion's 9 is an end token that equals the padding: it counts, padding does not.
    assert first.loss_mask.int().tolist() == [[0, 0, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    assert first.position_ids.tolist() == [list(range(8))] * 2
    assert first.lengths.tolist() == [5, 2] and first.num_positions == 7
    assert first.num_loss_tokens == 5
    # An aborted completion of no tokens is kept, without loss.
    assert second.row_ids.tolist() == [2]
    assert second.tokens.tolist() == [[8, 9, 9, 9]]
    assert second.lengths.tolist() == [1]
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
    batching=st.builds(
        MicroBatching,
        micro_batch_size=st.integers(1, 5),
        max_tokens=st.none() | st.integers(1, 30),
        packing=st.booleans(),
        pad_to_multiple_of=st.sampled_from([1, 2, 8]),
        same_shape=st.booleans(),
        same_number=st.just(True),
        hidden_size=st.none() | st.just(2),
    ),
    peers=st.lists(st.lists(st.integers(1, 12), max_size=9), min_size=1, max_size=2),
)
def test_micro_batches_hold_every_row_once(
    rows: list[TokenRow], batching: MicroBatching, peers: list[list[int]]
):
    multiple, lengths = batching.pad_to_multiple_of, [len(p) + len(c) for p, c in rows]
    micro_batches = make_micro_batches(rows, batching, peers=[*peers, lengths])
    needed = [len(batching.groups(of_rank)) for of_rank in (lengths, *peers)]
    assert len(micro_batches) == max(1, *needed)
    assert [len(micro_batch.row_ids) for micro_batch in micro_batches[needed[0] :]] == [1] * (
        len(micro_batches) - needed[0]
    )
    seen: list[int] = []
    for micro_batch in micro_batches:
        length = micro_batch.tokens.shape[1]
        assert length % multiple == 0
        longest = 1
        for slot, row_id in enumerate(micro_batch.row_ids.tolist()):
            mask = micro_batch.loss_mask[slot]
            if row_id == -1:
                assert not mask.any() and micro_batch.num_positions == 0
                continue
            seen.append(row_id)
            prompt, completion = rows[row_id]
            sequence, num_labels = [*prompt, *completion], len(prompt) + len(completion) - 1
            longest = max(longest, num_labels)
            assert micro_batch.lengths[slot] == max(1, num_labels)
            # Label t is token t + 1, and the masked labels are the completion.
            assert micro_batch.tokens[slot, :num_labels].tolist() == sequence[:-1]
            assert micro_batch.labels[slot, :num_labels].tolist() == sequence[1:]
            assert micro_batch.labels[slot, mask].tolist() == list(completion)
        assert length - longest < multiple
    assert sorted(seen) == list(range(len(rows)))


@given(rows=token_rows, micro_batch_size=st.integers(1, 5))
def test_values_go_there_and_back(rows: list[TokenRow], micro_batch_size: int):
    batching = MicroBatching(micro_batch_size=micro_batch_size, same_number=True)
    micro_batches = make_micro_batches(rows, batching, peers=[[1] * 70])  # and filler
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
    batching = MicroBatching(micro_batch_size=2, same_number=True)
    first, second, filler = make_micro_batches(rows, batching, peers=[[2, 3, 4], [9] * 5])
    assert select_row_values(advantages, first).tolist() == [2.0, -1.0]
    assert select_row_values(advantages, second).tolist() == [0.5]
    assert select_row_values(advantages, filler).tolist() == [0.0]
    assert select_row_values(torch.zeros(0), filler).tolist() == [0.0]
    assert advantages.tolist() == [0.5, -1.0, 2.0]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="row 1: the prompt has no tokens"):
        make_micro_batches([([1], [2]), ([], [2])], MicroBatching(micro_batch_size=2))
    (micro_batch,) = make_micro_batches([([1], [2, 3])], MicroBatching(micro_batch_size=2))
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
    with pytest.raises(ValueError, match=r"MicroBatch\.lengths"):
        MicroBatch(**good | {"lengths": torch.ones(1, 2, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"MicroBatch\.row_ids"):
        MicroBatch(**good | {"row_ids": torch.zeros(2, dtype=torch.int64)})


def test_to_moves_all_tensors():
    (micro_batch,) = make_micro_batches([([1], [2, 3])], MicroBatching(micro_batch_size=2))
    moved = micro_batch.to("meta")
    assert all(getattr(moved, name).is_meta for name in MicroBatch.__slots__)


def test_a_row_that_is_in_no_group_or_in_two_is_seen(monkeypatch: pytest.MonkeyPatch):
    """A mistake in the counting of budgets may not lose a row."""
    rows: list[TokenRow] = [([1], [2]), ([1], [2, 3])]
    for groups in ([[1]], [[1, 0], [0]]):
        monkeypatch.setattr(MicroBatching, "groups", lambda self, lengths, g=groups: g)
        with pytest.raises(AssertionError, match="every row belongs to one"):
            make_micro_batches(rows, MicroBatching(micro_batch_size=2))
