"""From config.json to an architecture for the families beside Llama, and what is refused.

Configs are written by transformers' own classes, in the form that it writes today, and rewritten to
the older form; test_llama_config.py has what the families share.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gdpo_megatron.conversion.architecture import MixtureOfExperts
from gdpo_megatron.conversion.families import families, load_architecture
from gdpo_megatron.errors import InputError

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 6}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "mixtral": EXPERTS,
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {**EXPERTS, "moe_intermediate_size": 12, "norm_topk_prob": True},
}


def written(model_type: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """config.json as transformers writes it."""
    from transformers import AutoConfig

    AutoConfig.for_model(
        model_type, **{**SIZES, **FAMILIES[model_type], **changes}
    ).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def rewrite(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def older_form(folder: Path) -> None:
    """The keys of transformers 4."""
    config = json.loads((folder / "config.json").read_text())
    changes = {"rope_parameters": None, "rope_theta": 5e5, "torch_dtype": config.pop("dtype", None)}
    if config["model_type"] == "qwen3_moe":
        changes |= {"num_experts": 6, "num_local_experts": None}
    rewrite(folder, **changes)


def test_all_families_are_here() -> None:
    assert set(families.names()) == set(FAMILIES)


@pytest.mark.parametrize("old", [False, True], ids=["new form", "old form"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_sizes(model_type: str, old: bool, tmp_path: Path) -> None:
    written(model_type, tmp_path)
    if old:
        older_form(tmp_path)
    arch = load_architecture(tmp_path)
    assert arch.family == model_type
    assert (arch.num_layers, arch.hidden_size, arch.intermediate_size) == (3, 32, 40)
    assert (arch.num_attention_heads, arch.num_key_value_heads) == (4, 2)
    assert arch.head_dim == {"qwen3": 16}.get(model_type, 8)
    assert (arch.vocab_size, arch.rope_theta, arch.rope_scaling) == (50, 5e5, None)
    assert arch.has_qkv_bias == (model_type == "qwen2")
    assert arch.has_qk_norm == model_type.startswith("qwen3")
    assert arch.tie_word_embeddings is False
    # transformers' MistralConfig has a window unless it is told otherwise.
    assert arch.sliding_window == {"mistral": 4096}.get(model_type)
    experts = {
        "mixtral": MixtureOfExperts(
            num_experts=6, intermediate_size=40, top_k=2, normalize_top_k=True
        ),
        "qwen3_moe": MixtureOfExperts(
            num_experts=6, intermediate_size=12, top_k=2, normalize_top_k=True
        ),
    }
    assert arch.moe == experts.get(model_type)
    assert arch.mlp_columns == {"qwen3_moe": 12}.get(model_type, 40)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_tied_embeddings_are_read(model_type: str, tmp_path: Path) -> None:
    written(model_type, tmp_path, tie_word_embeddings=True)
    assert load_architecture(tmp_path).tie_word_embeddings is True


@pytest.mark.parametrize(
    ("changes", "window"),
    [({"sliding_window": None}, 4096), ({"sliding_window": 16}, 16)],
    ids=["absent", "given"],
)
def test_window_of_mistral(changes: dict[str, Any], window: int, tmp_path: Path) -> None:
    """Absent is what the first Mistral meant; null is what the later ones say."""
    written("mistral", tmp_path)
    rewrite(tmp_path, **changes)
    assert load_architecture(tmp_path).sliding_window == window


def test_null_window_of_mistral(tmp_path: Path) -> None:
    config = written("mistral", tmp_path, sliding_window=None)
    assert config["sliding_window"] is None
    assert load_architecture(tmp_path).sliding_window is None


def test_window_of_qwen_without_its_switch(tmp_path: Path) -> None:
    """Qwen2.5's configs name a window that is switched off."""
    written("qwen2", tmp_path)
    rewrite(tmp_path, use_sliding_window=False, sliding_window=32768, max_window_layers=21)
    assert load_architecture(tmp_path).sliding_window is None


def test_raw_router_weights(tmp_path: Path) -> None:
    written("qwen3_moe", tmp_path, norm_topk_prob=False)
    moe = load_architecture(tmp_path).moe
    assert moe is not None and moe.normalize_top_k is False


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("qwen2", {"use_sliding_window": True}, "sliding windows are not supported"),
        (
            "qwen2",
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "'layer_types' holds 'sliding_attention'; only full_attention is supported",
        ),
        ("qwen3", {"attention_bias": True}, "attention biases are not supported for qwen3"),
        ("qwen3", {"head_dim": None}, "'head_dim' must be a number, got None"),
        ("qwen2", {"num_key_value_heads": None}, "'num_key_value_heads' must be a number"),
        ("qwen2", {"hidden_act": "gelu"}, "only silu is supported for qwen2"),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
            "rope type 'yarn' is not supported; choices: default, llama3",
        ),
        ("mistral", {"sliding_window": 0}, "'sliding_window' must be positive, got 0"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "layers without experts are not supported"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "layers without experts are not supported"),
        (
            "qwen3_moe",
            {"num_experts": 8},
            "needs 'num_local_experts' or 'num_experts', got {'num_local_experts': 6, "
            "'num_experts': 8}",
        ),
        (
            "qwen3_moe",
            {"num_local_experts": None, "num_experts": None},
            "needs 'num_local_experts' or 'num_experts', got neither",
        ),
        ("qwen3_moe", {"norm_topk_prob": 1}, "'norm_topk_prob' must be true or false, got 1"),
        ("mixtral", {"router_jitter_noise": 0.1}, "noise at the router is not supported"),
        ("llama", {"tie_word_embeddings": "no"}, "'tie_word_embeddings' must be true or false"),
    ],
)
def test_refused(model_type: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    written(model_type, tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(InputError) as caught:
        load_architecture(tmp_path)
    assert message in str(caught.value) and str(tmp_path / "config.json") in str(caught.value)
