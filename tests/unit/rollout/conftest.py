"""A model with a chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gdpo_megatron.certify.family_models import MODELS, save_model

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<pad>{{ message.role }}\n{{ message.content }}<eos>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<pad>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def chat_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model whose tokenizer is byte-level, with a chat template like Qwen's."""
    folder = tmp_path_factory.mktemp("chat")
    save_model(folder, **(MODELS["gqa"] | {"max_position_embeddings": 512}))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": CHAT_TEMPLATE}))
    return folder
