"""Model families by Hugging Face `model_type`: a function from config.json to an architecture.

Packages add families through the entry point group `gdpo_megatron.families`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gdpo_megatron.conversion.architecture import ModelArchitecture, read_hf_config
from gdpo_megatron.conversion.families.llama import llama_architecture
from gdpo_megatron.errors import InputError
from gdpo_megatron.registry import Registry

ArchitectureFn = Callable[[Mapping[str, Any], str], ModelArchitecture]

families: Registry[ArchitectureFn] = Registry("model family", "gdpo_megatron.families")
families.add("llama", llama_architecture)


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
