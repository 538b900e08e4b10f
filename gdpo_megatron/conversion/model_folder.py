"""A model folder of either format: which one it is, its weights, and the files beside them.

    Hugging Face                      Megatron (torch_dist), or a checkpoint of a run
    config.json, tokenizer ...        hf/config.json, hf/tokenizer ...
    model*.safetensors                .metadata, *.distcp, metadata.json, common.pt

The files beside the weights are what makes a Megatron checkpoint a model again: its shape, its
tokenizer, where its completions end.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from gdpo_megatron.conversion.architecture import ModelArchitecture, read_hf_config
from gdpo_megatron.conversion.checks import DTYPES, dtype_name
from gdpo_megatron.conversion.hf_io import HFCheckpoint
from gdpo_megatron.conversion.megatron_io import MEGATRON_METADATA, MegatronCheckpoint
from gdpo_megatron.data.tokenizer import TOKENIZER_FILES
from gdpo_megatron.errors import InputError

HF_FILES = "hf"
"""Folder within a Megatron checkpoint for the model's config.json, tokenizer and so on."""

_CONFIG = "config.json"
_GENERATION = "generation_config.json"
_TEMPLATES = "additional_chat_templates"
_TERMS = ("LICENSE*", "NOTICE*", "USE_POLICY*")


class Checkpoint(Protocol):
    """Weights of a model folder, by their Hugging Face names."""

    folder: Path
    dtypes: dict[str, torch.dtype]
    """Of each tensor of the architecture."""

    def get(self, name: str) -> Tensor:
        """The full tensor of a name, on the CPU."""
        ...


def is_megatron(folder: Path) -> bool:
    """Whether a folder is a Megatron distributed checkpoint."""
    return (folder / MEGATRON_METADATA).is_file()


def model_files(folder: Path) -> Path:
    """The folder that holds a model's config.json and tokenizer: itself, or its `hf`.

    Raises:
        InputError: a Megatron checkpoint that carries none.
    """
    if not is_megatron(folder):
        return folder
    if not (folder / HF_FILES / _CONFIG).is_file():
        raise InputError(
            f"{folder}: a Megatron checkpoint without {HF_FILES}/{_CONFIG}: nothing says which "
            "model it is; `gdpo-megatron convert --hf-files FOLDER` takes it from the model's "
            "Hugging Face folder"
        )
    return folder / HF_FILES


def open_checkpoint(folder: Path, arch: ModelArchitecture) -> Checkpoint:
    """The weights of a model folder, whichever format it has.

    Raises:
        InputError: they are not exactly those of the architecture.
    """
    if is_megatron(folder):
        return MegatronCheckpoint(folder, arch)
    return HFCheckpoint(folder, arch)


def uniform_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The one dtype of all tensors.

    Raises:
        InputError: there are several.
    """
    found = sorted({dtype_name(dtype) for dtype in checkpoint.dtypes.values()})
    if len(found) > 1:
        raise InputError(f"{checkpoint.folder}: holds {' and '.join(found)}; choose one by --dtype")
    if found[0] not in DTYPES:
        raise InputError(
            f"{checkpoint.folder}: holds {found[0]}, which is not written; choose --dtype "
            f"{', '.join(DTYPES)}"
        )
    return DTYPES[found[0]]


def copy_model_files(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Carry over everything of a Hugging Face folder but the weights and the model card.

    Args:
        source: with config.json, generation config, tokenizer, chat template, licence.
        target: exists.
        dtype: of the weights that go with it.
    """
    copy_model_config(source, target, dtype)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for path in (path for pattern in _TERMS for path in sorted(source.glob(pattern))):
        shutil.copyfile(path, target / path.name)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, target / _TEMPLATES, dirs_exist_ok=True)


def copy_model_config(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Carry over config.json and generation_config.json; only the dtype may become another."""
    config = read_hf_config(source)
    if config.get("dtype", config.get("torch_dtype")) == dtype_name(dtype):
        shutil.copyfile(source / _CONFIG, target / _CONFIG)
    else:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype_name(dtype)
        (target / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    if (source / _GENERATION).is_file():
        shutil.copyfile(source / _GENERATION, target / _GENERATION)
