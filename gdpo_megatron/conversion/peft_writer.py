"""LoRA adapters in terms of the mapping, and as a folder that the `peft` library loads.

    <folder>/adapter_config.json
    <folder>/adapter_model.safetensors    base_model.model.<module>.lora_A.weight and lora_B.weight

A row of the mapping is one linear layer of Megatron and up to three modules of Hugging Face:
these share A, and B is split by the layout of the weight.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from gdpo_megatron.config.lora import LoraConfig
from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.conversion.checks import dtype_name
from gdpo_megatron.conversion.layouts import Copy, Layout
from gdpo_megatron.conversion.mapping import Row, mapping_rows
from gdpo_megatron.conversion.output_folder import OutputFolder

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def lora_target(row: Row) -> str | None:
    """The linear layer of every transformer layer that a row is the weight of; None of others."""
    module, _, kind = row.megatron[0].rpartition(".")
    if row.layer is None or row.expert is not None or kind != "weight":
        return None
    return module.rpartition(".")[2] if row.layout.tp_dim is not None else None


def lora_targets(arch: ModelArchitecture) -> list[str]:
    """The layers of a model that can have an adapter, in the order of the table."""
    return list(dict.fromkeys(filter(None, map(lora_target, mapping_rows(arch)))))


def a_layout(row: Row) -> Layout:
    """How A lies on tensor-parallel ranks: cut along the input if the weight is."""
    return Copy(1) if row.layout.tp_dim == 1 else Copy()


def b_layout(row: Row) -> Layout:
    """How B lies on tensor-parallel ranks: as the weight where that is cut along its output."""
    return Copy() if row.layout.tp_dim == 1 else row.layout


def peft_names(weight: str) -> tuple[str, str]:
    """Names of A and B beside a Hugging Face weight."""
    module = _PREFIX + weight.removesuffix(".weight")
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def peft_config(arch: ModelArchitecture, lora: LoraConfig, base: str) -> dict[str, Any]:
    """adapter_config.json.

    Args:
        arch: of the model.
        lora: what was trained.
        base: model folder that the adapters belong to.
    """
    rows = [row for row in mapping_rows(arch) if lora_target(row) in lora.target_modules]
    modules = dict.fromkeys(
        name.removesuffix(".weight").rpartition(".")[2] for row in rows for name in row.hf
    )
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }


def write_peft_folder(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    arch: ModelArchitecture,
    lora: LoraConfig,
    *,
    base: Path,
) -> None:
    """Write adapters for PEFT; they replace an older folder only when they are whole.

    Args:
        folder: where they go.
        tensors: (PEFT name, whole tensor) of all adapters.
        arch: of the model.
        lora: what was trained.
        base: model folder that the adapters belong to.

    Raises:
        InputError: no space, or `folder` is something else than an export.
        RuntimeError: the tensors are not exactly those of the adapters.
    """
    # Modules that share A have a copy each: the format knows no shared tensors.
    held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors}
    shapes = peft_shapes(arch, lora)
    wrong = sorted(
        name
        for name in shapes.keys() | held.keys()
        if name not in held or tuple(held[name].shape) != shapes.get(name)
    )
    if wrong:
        raise RuntimeError(f"PEFT export: {len(wrong)} tensors are wrong, the first is {wrong[0]}")
    with OutputFolder(folder, overwrite=True) as out:
        save_file(held, out.path / _WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(peft_config(arch, lora, str(base)), indent=2)
        (out.path / _CONFIG).write_text(text + "\n")
        dtype = dtype_name(next(iter(held.values())).dtype)
        out.publish({"kind": "peft", "source": str(base), "dtype": dtype})


def peft_shapes(arch: ModelArchitecture, lora: LoraConfig) -> dict[str, tuple[int, int]]:
    """Every tensor of a PEFT folder, with its shape, in layer order."""
    shapes: dict[str, tuple[int, int]] = {}
    for row in mapping_rows(arch):
        if lora_target(row) not in lora.target_modules:
            continue
        for weight, (size_out, size_in) in zip(row.hf, row.shapes, strict=True):
            name_a, name_b = peft_names(weight)
            shapes[name_a], shapes[name_b] = (lora.rank, size_in), (size_out, lora.rank)
    return shapes
