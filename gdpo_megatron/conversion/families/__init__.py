"""Model families by Hugging Face `model_type`: a table of tensors and a config function each.

Packages add families through the entry point group `gdpo_megatron.families`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gdpo_megatron.conversion.architecture import ModelArchitecture, read_hf_config
from gdpo_megatron.conversion.families.llama import llama_architecture
from gdpo_megatron.conversion.families.mistral import mistral_architecture
from gdpo_megatron.conversion.families.mixtral import mixtral_architecture
from gdpo_megatron.conversion.families.qwen2 import qwen2_architecture
from gdpo_megatron.conversion.families.qwen3 import qwen3_architecture
from gdpo_megatron.conversion.families.qwen3_moe import qwen3_moe_architecture
from gdpo_megatron.errors import InputError
from gdpo_megatron.registry import Registry

ArchitectureFn = Callable[[Mapping[str, Any], str], ModelArchitecture]

families: Registry[ArchitectureFn] = Registry("model family", "gdpo_megatron.families")
for _model_type, _read in {
    "llama": llama_architecture,
    "mistral": mistral_architecture,
    "mixtral": mixtral_architecture,
    "qwen2": qwen2_architecture,
    "qwen3": qwen3_architecture,
    "qwen3_moe": qwen3_moe_architecture,
}.items():
    families.add(_model_type, _read)


def load_architecture(folder: Path) -> ModelArchitecture:
    """Architecture of a Hugging Face model folder.

    Raises:
        InputError: no config, an unknown family, or a feature that the family does not support.
    """
    config = read_hf_config(folder)
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(f"{folder / 'config.json'}: no model_type")
    return families.get(model_type)(config, str(folder / "config.json"))
