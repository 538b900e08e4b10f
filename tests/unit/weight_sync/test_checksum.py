"""Checksums: their definition, what they see, and that shards of every layout add up to them.

That ranks add them up is shown in tests/distributed/test_weight_sync.py.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.conversion.families.qwen2 import LAYER_ROWS
from gdpo_megatron.conversion.mapping import Row, mapping_rows
from gdpo_megatron.weight_sync import checksum
from gdpo_megatron.weight_sync.checksum import TensorSum, shard_sums

MASK = (1 << 64) - 1


def architecture(heads: int, groups: int, columns: int, vocab: int) -> ModelArchitecture:
    return ModelArchitecture(
        family="qwen2",
        num_layers=1,
        hidden_size=6,
        intermediate_size=columns,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=2,
        vocab_size=vocab,
        max_position_embeddings=16,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=None,
        tie_word_embeddings=False,
        initializer_range=0.02,
        layer_rows=LAYER_ROWS,
    )


def hash_of(place: int, stream: int) -> int:
    """Splitmix64 of a place, made odd, in Python's whole numbers."""
    x = (place * 0x9E3779B97F4A7C15 + stream) & MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
    return (x ^ x >> 31) | 1


def by_hand(words: list[list[int]]) -> int:
    rows, columns = 0x243F6A8885A308D3, 0x13198A2E03707344
    return (
        sum(
            word * hash_of(r, rows) * hash_of(c, columns)
            for r, row in enumerate(words)
            for c, word in enumerate(row)
        )
        & MASK
    )


def value(tensor: Tensor, word: torch.dtype = torch.int32) -> int:
    return int(TensorSum(tuple(tensor.shape), word).of(tensor)) & MASK


def test_definition(monkeypatch: pytest.MonkeyPatch):
    tensor = torch.tensor([[1.0, -2.5, 0.0], [3e-8, -0.0, 7.0]])
    assert value(tensor) == by_hand(tensor.view(torch.int32).tolist())
    half = torch.tensor([[1.0, -2.5], [3.0, 0.1], [-4.0, 5.0]]).bfloat16()
    assert value(half) == by_hand(half.view(torch.int32).tolist())  # a pair is one word
    assert value(half, torch.int16) == by_hand(half.view(torch.int16).tolist())
    vector = torch.tensor([0.5, -1.0, 2.0])
    assert value(vector) == by_hand(vector.view(3, 1).view(torch.int32).tolist())
    monkeypatch.setattr(checksum, "_CHUNK_WORDS", 3)  # a row at a time
    assert value(tensor) == by_hand(tensor.view(torch.int32).tolist())
    # A tensor that begins within a word.
    storage = torch.cat([torch.zeros(1).bfloat16(), half.reshape(-1)])
    assert value(storage[1:].view(3, 2)) == value(half)


def test_what_is_seen():
    """Each bit, each exchange of two rows, columns or elements, and the sign of zero."""
    tensor = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    found = {value(tensor)}
    for element in range(20):
        for bit in range(32):
            changed = tensor.clone()
            changed.view(-1).view(torch.int32)[element] ^= 1 << bit if bit < 31 else -(1 << 31)
            found.add(value(changed))
    assert len(found) == 1 + 20 * 32
    for order in ([1, 0, 2, 3, 4], [4, 1, 2, 3, 0], [1, 2, 3, 4, 0]):
        found.add(value(tensor[order]))
    for order in ([1, 0, 2, 3], [3, 2, 1, 0]):
        found.add(value(tensor[:, order]))
    found.add(value(tensor.reshape(4, 5).t().contiguous()))
    assert len(found) == 1 + 20 * 32 + 6
    assert value(torch.zeros(3, 2)) != value(-torch.zeros(3, 2))


def shards(row: Row, tensors: list[Tensor], arch: ModelArchitecture, tp: int) -> list[Tensor]:
    full = row.layout.merge(tensors, arch, tp)
    return [row.layout.shard(full, rank, tp) for rank in range(tp)]


@settings(max_examples=40)
@given(
    st.sampled_from([1, 2, 4]),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(3, 400),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_shards_add_up(
    tp: int, groups: int, queries: int, columns: int, vocab: int, dtype: torch.dtype
):
    """Padding counts nothing; a shard that is another rank's does not add up."""
    groups *= tp
    arch = architecture(groups * queries, groups, columns * tp, vocab)
    draw = torch.Generator().manual_seed(vocab)
    for row in mapping_rows(arch):
        tensors = [torch.randn(shape, generator=draw).to(dtype) for shape in row.shapes]
        word = checksum._word(row, tp, dtype)
        parts = shards(row, tensors, arch, tp)
        holders = range(tp) if row.layout.tp_dim is not None else range(1)
        total = sum(shard_sums(parts[r], row, word, arch, tp, r, tp) for r in holders)
        assert isinstance(total, Tensor)
        expected = [int(TensorSum(tuple(t.shape), word).of(t)) for t in tensors]
        assert total.tolist() == expected
        if row.layout.tp_dim is not None and tp > 1:
            other = sum(shard_sums(parts[r - 1], row, word, arch, tp, r, tp) for r in holders)
            assert isinstance(other, Tensor) and other.tolist() != expected


def test_words():
    """Pairs only where every rank has whole ones."""
    rows = {row.megatron[0]: row for row in mapping_rows(architecture(4, 4, 6, 5))}
    down, norm = rows["mlp.linear_fc2.weight"], rows["decoder.final_layernorm.weight"]
    assert checksum._word(down, 1, torch.bfloat16) == torch.int32
    assert checksum._word(down, 2, torch.bfloat16) == torch.int16  # 3 columns each
    assert checksum._word(down, 2, torch.float32) == torch.int32
    assert checksum._word(norm, 1, torch.bfloat16) == torch.int16
