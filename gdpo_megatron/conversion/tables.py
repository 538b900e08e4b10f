"""Lines that families' tables are made of: a layer's Megatron parameters and their tensors.

A line names one Megatron parameter below `decoder.layers.<i>.` and the Hugging Face tensors below
`model.layers.<L>.` that it holds, each with its shape in letters:

    h hidden size              q query heads * head size       E experts
    f MLP columns              k key/value heads * head size   e columns of one expert
    d head size

A family whose tensors have the usual names puts blocks of this file together; another one adds
lines of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from gdpo_megatron.conversion.layouts import QKV, Copy, GatedMLP, Layout


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One Megatron parameter of a layer.

    Args:
        megatron: its name, and after a "|" that of Transformer Engine's spec where it differs
            (TE fuses a norm into the linear layer that follows it).
        tensors: (Hugging Face name, shape in letters) of each tensor that it holds, in order.
        layout: the way between them.
        per_expert: there is one for each expert, which stands for "{expert}" in the names.
    """

    megatron: str
    tensors: tuple[tuple[str, str], ...]
    layout: Layout
    per_expert: bool = False


INPUT_NORM = LayerRow(
    "input_layernorm.weight|self_attention.linear_qkv.layer_norm_weight",
    (("input_layernorm.weight", "h"),),
    Copy(),
)
QKV_WEIGHT = LayerRow(
    "self_attention.linear_qkv.weight",
    (
        ("self_attn.q_proj.weight", "qh"),
        ("self_attn.k_proj.weight", "kh"),
        ("self_attn.v_proj.weight", "kh"),
    ),
    QKV(),
)
QKV_BIAS = LayerRow(
    "self_attention.linear_qkv.bias",
    (
        ("self_attn.q_proj.bias", "q"),
        ("self_attn.k_proj.bias", "k"),
        ("self_attn.v_proj.bias", "k"),
    ),
    QKV(),
)
QUERY_NORM = LayerRow(
    "self_attention.q_layernorm.weight", (("self_attn.q_norm.weight", "d"),), Copy()
)
KEY_NORM = LayerRow(
    "self_attention.k_layernorm.weight", (("self_attn.k_norm.weight", "d"),), Copy()
)
ATTENTION_OUTPUT = LayerRow(
    "self_attention.linear_proj.weight", (("self_attn.o_proj.weight", "hq"),), Copy(1)
)
GATED_MLP = (
    LayerRow(
        "pre_mlp_layernorm.weight|mlp.linear_fc1.layer_norm_weight",
        (("post_attention_layernorm.weight", "h"),),
        Copy(),
    ),
    LayerRow(
        "mlp.linear_fc1.weight",
        (("mlp.gate_proj.weight", "fh"), ("mlp.up_proj.weight", "fh")),
        GatedMLP(),
    ),
    LayerRow("mlp.linear_fc2.weight", (("mlp.down_proj.weight", "hf"),), Copy(1)),
)


def expert_rows(router: str, gate: str, up: str, down: str) -> tuple[LayerRow, ...]:
    """The lines of a mixture of experts, whose norm stays a module of its own in both specs.

    Args:
        router: Hugging Face name of the router's weight.
        gate: of an expert's gate projection, with "{expert}" for its number.
        up: of its up projection.
        down: of its down projection.
    """
    expert = "mlp.experts.local_experts.{expert}"
    return (
        LayerRow("pre_mlp_layernorm.weight", (("post_attention_layernorm.weight", "h"),), Copy()),
        LayerRow("mlp.router.weight", ((router, "Eh"),), Copy()),
        LayerRow(
            f"{expert}.linear_fc1.weight", ((gate, "eh"), (up, "eh")), GatedMLP(), per_expert=True
        ),
        LayerRow(f"{expert}.linear_fc2.weight", ((down, "he"),), Copy(1), per_expert=True),
    )
