"""Is a model folder what it says: its files, its tensors, and what Megatron computes with them.

The logits of the Megatron model are compared with those of transformers in float32, and so is the
hidden state after each layer's attention and MLP: the first one that differs is where to look.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.conversion.checks import dtype_name, num_non_finite
from gdpo_megatron.conversion.mapping import hf_shapes
from gdpo_megatron.conversion.model_folder import Checkpoint
from gdpo_megatron.layer_values import (
    Comparison,
    compare_values,
    join_alone,
    megatron_model,
    record_megatron,
    record_transformers,
    transformers_model,
)
from gdpo_megatron.platform import Platform, detect_platform


def different_tensors(one: Checkpoint, other: Checkpoint, arch: ModelArchitecture) -> list[str]:
    """One line for each tensor that is not the same, bit for bit."""
    lines: list[str] = []
    for name in hf_shapes(arch):
        x, y = one.get(name), other.get(name)
        if x.dtype != y.dtype:
            lines.append(f"{name}: {dtype_name(x.dtype)} and {dtype_name(y.dtype)}")
        elif not torch.equal(_bits(x), _bits(y)):
            differs = _bits(x) != _bits(y)
            largest = float((x.double() - y.double()).abs().max())
            lines.append(
                f"{name}: {int(differs.sum()):,} of {x.numel():,} values differ, by {largest:.3g}"
            )
    return lines


def _bits(tensor: Tensor) -> Tensor:
    """The values as integers: NaN equals itself, and 0.0 is not -0.0."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.dtype.itemsize])


def non_finite_tensors(checkpoint: Checkpoint, arch: ModelArchitecture) -> dict[str, int]:
    """Tensor -> how many of its values are NaN or infinite."""
    counts = {name: num_non_finite(checkpoint.get(name)) for name in hf_shapes(arch)}
    return {name: count for name, count in counts.items() if count}


def compare_with_transformers(
    folder: Path,
    checkpoint: Checkpoint,
    arch: ModelArchitecture,
    prompts: Sequence[Sequence[int]],
    *,
    reference: Path | None = None,
    platform: Platform | None = None,
) -> list[Comparison]:
    """Run both models in float32 and compare what every layer gives; logits come last.

    One model at a time is in memory, in float64 with 8 bytes for each parameter.

    Args:
        folder: the model.
        checkpoint: its weights, which the Megatron model is loaded from.
        arch: its shape.
        prompts: token ids.
        reference: Hugging Face folder that transformers reads; None means `folder`, and where that
            is a Megatron checkpoint, transformers is given the tensors.
        platform: the machine; None: the one that is found.
    """
    platform = platform or detect_platform()
    join_alone(platform)
    theirs = transformers_model(reference or folder, checkpoint, arch).to(platform.device)
    single = record_transformers(theirs, prompts)
    theirs = theirs.double()
    double = record_transformers(theirs, prompts)
    del theirs
    ours = megatron_model(platform, checkpoint, arch, max(map(len, prompts)))
    return compare_values(record_megatron(ours, prompts), single, single, double)
