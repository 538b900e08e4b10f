"""The data order: complete epochs, the same stream after a resume, no global random state."""

from __future__ import annotations

import random
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gdpo_megatron.data.sampler import PromptSampler
from gdpo_megatron.errors import InputError

sizes = st.integers(1, 12)


@given(num_rows=sizes, batch_size=sizes, seed=st.integers(-5, 2**70), shuffle=st.booleans())
def test_every_epoch_has_every_row_once(num_rows: int, batch_size: int, seed: int, shuffle: bool):
    sampler = PromptSampler(num_rows, batch_size, seed, shuffle)
    batches = [sampler.next_batch() for _ in range(2 * num_rows)]
    assert all(len(batch) == batch_size for batch in batches)
    stream = list(chain.from_iterable(batches))
    epochs = [stream[i : i + num_rows] for i in range(0, len(stream), num_rows)]
    assert len(epochs) == 2 * batch_size
    assert all(sorted(epoch) == list(range(num_rows)) for epoch in epochs)
    assert sampler.epoch == 2 * batch_size


@given(num_rows=sizes, batch_size=sizes, new_batch_size=sizes, num_before=st.integers(0, 9))
def test_a_resumed_stream_is_the_same(
    num_rows: int, batch_size: int, new_batch_size: int, num_before: int
):
    whole = PromptSampler(num_rows, 1, 3)
    stream = [whole.next_batch()[0] for _ in range(num_before * batch_size + 3 * new_batch_size)]
    first = PromptSampler(num_rows, batch_size, 3)
    drawn = [row for _ in range(num_before) for row in first.next_batch()]
    second = PromptSampler(num_rows, new_batch_size, 3)
    second.load_state_dict(first.state_dict())
    drawn += [row for _ in range(3) for row in second.next_batch()]
    assert drawn == stream


@given(
    num_rows=sizes,
    batch_size=sizes,
    returned=st.lists(st.integers(0, 12), min_size=1, max_size=6),
)
def test_no_row_is_lost_when_some_are_put_back(num_rows: int, batch_size: int, returned: list[int]):
    sampler, used = PromptSampler(num_rows, batch_size, 3), list[int]()
    for number in returned:
        batch = sampler.next_batch()
        keep = max(0, batch_size - number)
        used += batch[:keep]
        sampler.put_back(batch[keep:])
        resumed = PromptSampler(num_rows, batch_size, 3)
        resumed.load_state_dict(sampler.state_dict())
        sampler = resumed
    whole = PromptSampler(num_rows, 1, 3)
    # In the order in which they would have come: those put back are the next ones.
    assert used + sampler.next_batch(batch_size) == [
        whole.next_batch()[0] for _ in range(len(used) + batch_size)
    ]


def test_file_order_without_shuffle():
    sampler = PromptSampler(3, 2, 0, shuffle=False)
    assert [sampler.next_batch() for _ in range(3)] == [[0, 1], [2, 0], [1, 2]]


def test_the_stream_is_pinned():
    # Written down once: it must not change with the library versions, or old runs cannot resume.
    sampler = PromptSampler(8, 8, 1234)
    first, second = sampler.next_batch(), sampler.next_batch()
    assert first == [1, 6, 4, 0, 3, 5, 2, 7]
    assert second == [6, 7, 4, 2, 0, 1, 5, 3]
    assert PromptSampler(8, 8, 1235).next_batch() != first


def test_global_random_state_has_no_part():
    def draw() -> list[int]:
        sampler = PromptSampler(50, 70, 0)
        return sampler.next_batch() + sampler.next_batch()

    expected = draw()
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    assert draw() == expected
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_rows": 9}, "num_rows was 8, is 9"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"shuffle": False}, "shuffle was True, is False"),
    ],
)
def test_a_state_of_something_else_is_refused(change: dict[str, Any], message: str):
    state = PromptSampler(8, 4, 0).state_dict()
    options: dict[str, Any] = {"num_rows": 8, "batch_size": 4, "seed": 0}
    other = PromptSampler(**(options | change))
    with pytest.raises(InputError, match=message):
        other.load_state_dict(state)


def test_sizes_must_be_positive():
    with pytest.raises(ValueError, match="num_rows 0"):
        PromptSampler(0, 4, 0)
