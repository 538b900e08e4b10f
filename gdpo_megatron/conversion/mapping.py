"""One table between Hugging Face tensors and Megatron parameters: import, export, weight sync.

A row says which Megatron parameter holds which Hugging Face tensors, and by which layout. Layers
come from the family's table (families/, tables.py), the rest is the same for all families.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.conversion.layouts import Copy, Layout, Vocabulary
from gdpo_megatron.conversion.tables import LayerRow


@dataclass(frozen=True)
class Row:
    """One Megatron parameter: its names, the Hugging Face names, and the layout between them.

    `layer` is the global layer the row belongs to; None for `first` (embedding) and `last` (final
    norm, output layer) which live on the first and last pipeline stage.
    """

    megatron: tuple[str, ...]
    """Local spec name, then the Transformer Engine spec's where it differs; of an expert with
    "{expert}" for its number on the rank that holds it."""
    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Of the Hugging Face tensors."""
    layout: Layout
    layer: int | None = None
    last: bool = False
    import_only: bool = False
    """A second copy of a tied embedding, which the last of several stages holds for its softmax."""
    expert: int | None = None
    """Global number of the expert that it belongs to."""


_EMBEDDING = "model.embed_tokens.weight"


def mapping_rows(arch: ModelArchitecture) -> list[Row]:
    """All rows of a model in layer order: embedding, layers, final norm, output layer."""
    vocabulary, norm = (arch.vocab_size, arch.hidden_size), (arch.hidden_size,)
    rows = [Row(("embedding.word_embeddings.weight",), (_EMBEDDING,), (vocabulary,), Vocabulary())]
    common = [line for line in arch.layer_rows if not line.per_expert]
    of_expert = [line for line in arch.layer_rows if line.per_expert]
    num_experts = arch.moe.num_experts if arch.moe else 0
    for layer in range(arch.num_layers):
        rows += [_layer_row(arch, line, layer) for line in common]
        rows += [
            _layer_row(arch, line, layer, expert)
            for expert in range(num_experts)
            for line in of_expert
        ]
    tied = arch.tie_word_embeddings
    output = _EMBEDDING if tied else "lm_head.weight"
    final_norm = Row(("decoder.final_layernorm.weight",), ("model.norm.weight",), (norm,), Copy())
    output_layer = Row(
        ("output_layer.weight",), (output,), (vocabulary,), Vocabulary(), import_only=tied
    )
    return [*rows, replace(final_norm, last=True), replace(output_layer, last=True)]


def _layer_row(
    arch: ModelArchitecture, line: LayerRow, layer: int, expert: int | None = None
) -> Row:
    return Row(
        megatron=tuple(line.megatron.split("|")),
        hf=tuple(
            f"model.layers.{layer}.{name.replace('{expert}', str(expert))}"
            for name, _ in line.tensors
        ),
        shapes=tuple(tuple(arch.size_of(letter) for letter in shape) for _, shape in line.tensors),
        layout=line.layout,
        layer=layer,
        expert=expert,
    )


def hf_shapes(arch: ModelArchitecture) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Hugging Face checkpoint of `arch`, with its shape, in layer order."""
    return {
        name: shape
        for row in mapping_rows(arch)
        for name, shape in zip(row.hf, row.shapes, strict=True)
    }
