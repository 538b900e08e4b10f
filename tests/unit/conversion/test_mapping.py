"""The table between Hugging Face tensors and Megatron parameters: every rule has its inverse.

That Megatron computes the same with them is shown in tests/distributed/test_layouts.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from gdpo_megatron.certify.family_models import MODELS
from gdpo_megatron.conversion.architecture import MixtureOfExperts, ModelArchitecture
from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.families.llama import LAYER_ROWS as LLAMA_ROWS
from gdpo_megatron.conversion.families.mixtral import LAYER_ROWS as MIXTRAL_ROWS
from gdpo_megatron.conversion.families.qwen2 import LAYER_ROWS as QWEN2_ROWS
from gdpo_megatron.conversion.families.qwen3_moe import LAYER_ROWS as QWEN3_MOE_ROWS
from gdpo_megatron.conversion.layouts import QKV, Copy, GatedMLP, Vocabulary
from gdpo_megatron.conversion.mapping import hf_shapes, mapping_rows


def architecture(**changes: Any) -> ModelArchitecture:
    values: dict[str, Any] = {
        "family": "llama",
        "num_layers": 2,
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 1,
        "vocab_size": 5,
        "max_position_embeddings": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "layer_rows": LLAMA_ROWS,
        **changes,
    }
    return ModelArchitecture(**values)


@st.composite
def models(draw: st.DrawFn) -> tuple[ModelArchitecture, int]:
    """An architecture and a TP size that divides what it must."""
    tp = draw(st.sampled_from([1, 2, 3, 4, 8]))
    groups = tp * draw(st.integers(1, 2))
    rows = draw(st.sampled_from([LLAMA_ROWS, QWEN2_ROWS, QWEN3_MOE_ROWS, MIXTRAL_ROWS]))
    experts = MixtureOfExperts(
        num_experts=draw(st.integers(1, 4)),
        intermediate_size=tp * draw(st.integers(1, 3)),
        top_k=1,
        normalize_top_k=True,
    )
    arch = architecture(
        hidden_size=draw(st.integers(1, 9)),
        intermediate_size=tp * draw(st.integers(1, 5)),
        num_attention_heads=groups * draw(st.integers(1, 4)),
        num_key_value_heads=groups,
        head_dim=draw(st.sampled_from([1, 2, 6])),
        vocab_size=draw(st.integers(1, 200)),
        num_layers=draw(st.integers(1, 3)),
        tie_word_embeddings=draw(st.booleans()),
        layer_rows=rows,
        moe=experts if rows in (QWEN3_MOE_ROWS, MIXTRAL_ROWS) else None,
    )
    return arch, tp


def numbered(arch: ModelArchitecture) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint; no number occurs twice."""
    tensors, start = {}, 1
    for name, shape in hf_shapes(arch).items():
        count = int(torch.tensor(shape).prod())
        tensors[name] = torch.arange(start, start + count).reshape(shape)
        start += count
    return tensors


@given(models())
def test_every_row_is_undone(model: tuple[ModelArchitecture, int]) -> None:
    """split undoes merge, unshard undoes shard, and shards are equal parts of the whole."""
    arch, tp = model
    tensors = numbered(arch)
    for row in mapping_rows(arch):
        parts = [tensors[name] for name in row.hf]
        full = row.layout.merge(parts, arch, tp)
        for back, part in zip(row.layout.split(full, arch), parts, strict=True):
            assert torch.equal(back, part)
        shards = [row.layout.shard(full, rank, tp) for rank in range(tp)]
        assert torch.equal(row.layout.unshard(shards), full)
        assert len({shard.shape for shard in shards}) == 1
        assert row.layout.tp_dim is not None or torch.equal(shards[-1], full)
        if row.layout.tp_dim is not None:
            assert shards[0].shape[row.layout.tp_dim] * tp == full.shape[row.layout.tp_dim]
        numbers = full[full != 0]
        assert len(numbers.unique()) == len(numbers) == sum(part.numel() for part in parts)


@given(models())
def test_rows_cover_the_checkpoint_once(model: tuple[ModelArchitecture, int]) -> None:
    arch, _ = model
    rows = mapping_rows(arch)
    exported = [name for row in rows if not row.import_only for name in row.hf]
    assert exported == list(hf_shapes(arch))
    for layer in (None, *range(arch.num_layers)):
        names = [(name, r.expert) for r in rows if r.layer == layer for name in r.megatron]
        assert len(set(names)) == len(names)
    copies = [row for row in rows if row.import_only]
    assert len(copies) == int(arch.tie_word_embeddings)


def test_qkv_by_hand() -> None:
    """Two groups of two queries: a group's queries, then its key and its value; a rank has one."""
    q, k, v = torch.tensor([[1], [2], [3], [4]]), torch.tensor([[5], [6]]), torch.tensor([[7], [8]])
    full = QKV().merge([q, k, v], architecture(), 2)
    assert full.flatten().tolist() == [1, 2, 5, 7, 3, 4, 6, 8]
    assert QKV().shard(full, 1, 2).flatten().tolist() == [3, 4, 6, 8]


def test_gated_mlp_by_hand() -> None:
    """A rank holds its part of gate, then its part of up; not the first half of both."""
    gate, up = torch.tensor([[1], [2], [3], [4]]), torch.tensor([[5], [6], [7], [8]])
    full = GatedMLP(0).merge([gate, up], architecture(), 2)
    assert full.flatten().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert GatedMLP(0).shard(full, 0, 2).flatten().tolist() == [1, 2, 5, 6]
    assert GatedMLP(0).shard(full, 1, 2).flatten().tolist() == [3, 4, 7, 8]


def test_vocabulary_by_hand() -> None:
    """5 rows become 64, the new ones zero; three ranks make 192, which three divides."""
    tensor = torch.ones(5, 2)
    full = Vocabulary().merge([tensor], architecture(), 2)
    assert full.shape == (64, 2) and full.sum() == 10
    assert torch.equal(Vocabulary().split(full, architecture())[0], tensor)
    assert Vocabulary().merge([tensor], architecture(), 3).shape == (192, 2)
    assert Vocabulary().shard(full, 1, 2).sum() == 0


def test_input_dimension_is_cut_on_columns() -> None:
    matrix = torch.arange(8).reshape(2, 4)
    assert Copy(1).shard(matrix, 1, 2).tolist() == [[2, 3], [6, 7]]


@pytest.mark.parametrize("name", MODELS)
def test_tensors_are_those_that_transformers_writes(
    name: str, model_folder: Callable[[str], Path]
) -> None:
    """Names and shapes of a checkpoint of every family; head_dim is not always hidden / heads."""
    folder = model_folder(name)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        written = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    assert hf_shapes(load_architecture(folder)) == written


def test_padded_vocabulary_is_the_same_for_usual_tp_sizes() -> None:
    """So a checkpoint of one layout fits another."""
    arch = architecture(vocab_size=151)
    assert [arch.padded_vocab_size(tp) for tp in (1, 2, 4, 8, 16, 64)] == [192] * 6
    assert architecture(vocab_size=128).padded_vocab_size(8) == 128
