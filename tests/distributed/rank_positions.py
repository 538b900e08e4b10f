"""What attention gets of a pack, on this rank: rotated queries and keys of each row."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

from rank_layouts import in_layout  # prepares Megatron, so it comes first

import torch  # isort: skip
import rank_mutants  # isort: skip
from gdpo_megatron.certify.layout_models import MAX_LENGTH, make_rollouts
from gdpo_megatron.config.schema import PrecisionConfig, TrainConfig
from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.hf_io import HFCheckpoint
from gdpo_megatron.data.batching import make_micro_batches
from gdpo_megatron.policy.layer_spec import SDPACoreAttention
from gdpo_megatron.policy.model import MegatronModel


def run(models: str, mutants: list[str | None]) -> list[float]:
    """For each mutant of the packed model, how far its first layer is from the padded one's."""
    folder = Path(models) / "untied"
    arch, rows = load_architecture(folder), [make_rollouts().row(s) for s in range(10)]
    train = TrainConfig(micro_batch_size=len(rows))
    with in_layout() as layout:
        seen = []
        for mutant in ("padded", *mutants):
            model = MegatronModel(
                arch,
                **layout,
                precision=PrecisionConfig(),
                max_sequence_length=MAX_LENGTH,
                packing=mutant != "padded",
            )
            model.load_hf(HFCheckpoint(folder, arch))
            (batch,) = make_micro_batches(rows, model.micro_batching(train))
            with rank_mutants.MUTANTS[None if mutant == "padded" else mutant]():
                seen.append(_rotated(model, batch))
    return [float((packed - seen[0]).abs().max()) for packed in seen[1:]]


def _rotated(model: MegatronModel, batch: Any) -> torch.Tensor:
    """Queries and keys of the first layer, row after row: [t, heads, d]."""
    calls: list[torch.Tensor] = []
    original = SDPACoreAttention.forward

    def forward(self: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(torch.cat((query, key), -2))
        return original(self, query, key, *args, **kwargs)

    with mock.patch.object(SDPACoreAttention, "forward", forward):
        model.logprobs([batch], 1.0)
    first = calls[0]
    if first.ndim == 3:
        return first
    by_row = first.transpose(0, 1)
    return torch.cat([by_row[i, :n] for i, n in enumerate(batch.lengths.tolist())])
