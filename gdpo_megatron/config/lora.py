"""The `model.lora` section: train low-rank adapters instead of the model's own weights."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from gdpo_megatron.config.section import PositiveFloat, PositiveInt, section

LoraTarget = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


@section
class LoraConfig:
    """Train low-rank adapters beside linear layers; the model's own weights stay as they are."""

    rank: PositiveInt = 16
    """Rows of A and columns of B; an adapter adds alpha / rank * B A to its layer's weight."""

    alpha: PositiveFloat = 32.0
    """Numerator of that factor."""

    target_modules: tuple[LoraTarget, ...] = (
        "linear_qkv",
        "linear_proj",
        "linear_fc1",
        "linear_fc2",
    )
    """Layers that get one, by Megatron's names: queries, keys and values together, the attention's
    output, the MLP's gate and up projection together, its down projection. Experts get none."""

    @model_validator(mode="after")
    def _check_targets(self) -> LoraConfig:
        if not self.target_modules:
            raise ValueError("target_modules is empty; nothing would be trained")
        if len(set(self.target_modules)) < len(self.target_modules):
            raise ValueError(f"target_modules names a layer twice: {list(self.target_modules)}")
        return self
