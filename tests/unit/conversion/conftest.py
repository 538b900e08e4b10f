"""Small Llama configs for the conversion tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.conversion.families import load_architecture

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 19,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    """Write config.json with changes (None removes a key) into a folder; returns the folder."""

    def write(name: str = "model", **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        config = {k: v for k, v in {**CONFIG, **changes}.items() if v is not None}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write


@pytest.fixture
def arch(write_config: Callable[..., Path]) -> ModelArchitecture:
    return load_architecture(write_config("arch"))
