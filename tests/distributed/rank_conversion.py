"""Megatron's own loader and saver on converted folders, in a layout, on this rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rank_layouts import in_layout  # prepares Megatron: comes first

import torch  # isort: skip
import torch.distributed as dist
from megatron.core import dist_checkpointing

from gdpo_megatron.config.schema import PrecisionConfig
from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.hf_io import HFCheckpoint
from gdpo_megatron.policy.model import MegatronModel

# How megatron-core is told to give every layer, and every expert, a key of its own.
SINGLE = {"non_homogeneous_layers": True, "singleton_local_shards": True}


def run(
    models: str,
    converted: str,
    saved: str,
    names: list[str],
    layouts: dict[str, dict[str, int]],
    single: str | None,
) -> dict[str, dict[str, list[str]]]:
    """For each layout and model, the parameters that Megatron loads otherwise than `load_hf`.

    Args:
        models: folder with a Hugging Face folder for each name.
        converted: the same with distributed checkpoints.
        saved: where Megatron saves the models: <saved>/<layout>/<name>.
        names: of the models.
        layouts: name -> arguments of `in_layout`; EP is for models that have experts.
        single: the layout whose saves have a key for each layer.
    """
    results: dict[str, dict[str, list[str]]] = {}
    for layout, arguments in layouts.items():
        results[layout] = {}
        with in_layout(**arguments) as where:
            for name in names:
                arch = load_architecture(Path(models, name))
                if arguments.get("ep", 1) > 1 and arch.moe is None:
                    continue
                right, loaded = (
                    MegatronModel(
                        arch, precision=PrecisionConfig(), max_sequence_length=64, **where
                    )
                    for _ in range(2)
                )
                right.load_hf(HFCheckpoint(Path(models, name), arch))
                for chunk in loaded.chunks:
                    _spoil(chunk)
                state: Any = dist_checkpointing.load(_state(loaded), str(Path(converted, name)))
                for index, chunk in enumerate(loaded.chunks):
                    chunk.load_state_dict(state[f"chunk{index}"])
                results[layout][name] = [
                    difference
                    for found, expected in zip(loaded.chunks, right.chunks, strict=True)
                    for difference in _differences(found, expected)
                ]
                folder = Path(saved, layout, name)
                folder.mkdir(parents=True, exist_ok=True)
                dist.barrier()
                metadata = SINGLE if layout == single else None
                dist_checkpointing.save(_state(right, metadata), str(folder))
    return results


def _state(model: MegatronModel, metadata: dict[str, bool] | None = None) -> dict[str, Any]:
    return {
        f"chunk{index}": chunk.sharded_state_dict(metadata=metadata)
        for index, chunk in enumerate(model.chunks)
    }


def _spoil(model: torch.nn.Module) -> None:
    """What is not loaded stays NaN, and NaN equals nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))


def _differences(found: torch.nn.Module, expected: torch.nn.Module) -> list[str]:
    pairs = zip(found.named_parameters(), expected.named_parameters(), strict=True)
    return [name for (name, x), (_, y) in pairs if not torch.equal(x, y)]
