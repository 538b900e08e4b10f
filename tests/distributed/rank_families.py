"""Every family in a layout: logits, the way in and out, on this rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rank_layouts import in_layout  # prepares Megatron: comes first

import torch  # isort: skip
import torch.distributed as dist
from torch import Tensor

from gdpo_megatron.config.schema import PrecisionConfig
from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.hf_io import HFCheckpoint
from gdpo_megatron.data.batching import make_micro_batches
from gdpo_megatron.data.micro_batching import MicroBatching
from gdpo_megatron.policy.model import MegatronModel


def run(
    models: str, names: list[str], layouts: list[dict[str, int]], tokens: list[int]
) -> list[dict[str, dict[str, Any]]]:
    """For each layout and model, the logits of a row and the tensors that did not come back.

    Args:
        models: folder with a model folder for each name.
        names: of the models.
        layouts: arguments of `in_layout`; those of experts are for models that have some.
        tokens: ids of the row.
    """
    return [_in_layout(Path(models), names, layout, tokens) for layout in layouts]


def _in_layout(
    models: Path, names: list[str], layout: dict[str, int], tokens: list[int]
) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    with in_layout(**layout) as where:
        for name in names:
            arch = load_architecture(models / name)
            if arch.moe is None and not layout.keys().isdisjoint({"ep", "etp"}):
                continue
            model = MegatronModel(
                arch, precision=PrecisionConfig(), max_sequence_length=64, **where
            )
            reader = HFCheckpoint(models / name, arch)
            model.load_hf(reader)
            model.train(False)
            streamed = [(n, torch.equal(x, reader.get(n))) for n, x in model.hf_tensors()]
            results[name] = {
                "names": [n for n, _ in streamed],
                "changed": [n for n, same in streamed if not same],
                "logits": _logits(model, tokens),
            }
    return results


@torch.no_grad()
def _logits(model: MegatronModel, tokens: list[int]) -> Tensor | None:
    """Logits after each token of a row but the last, [s - 1, V], on the last stage."""
    batches = make_micro_batches([(tokens[:1], tokens[1:])], MicroBatching(micro_batch_size=1))
    whole: list[Tensor] = []

    def keep(logits: Tensor, _: Any) -> Tensor:
        parts = [torch.empty_like(logits) for _ in range(model.mesh.tp_size)]
        dist.all_gather(parts, logits.contiguous(), group=model.mesh.tp_group)
        whole.append(torch.cat(parts, -1)[0, : len(tokens) - 1, : model.arch.vocab_size])
        return logits

    model.run_schedule(batches, keep, forward_only=True)
    return whole[0] if whole else None
