"""Logits of the Megatron model against transformers', for a small random model of every family.

Which layers the model is made of is chosen as in a run: Transformer Engine's where it is, else
Megatron's local ones. For both to be seen, the machine is once said to have no Transformer Engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gdpo_megatron.certify.check import Findings, Measured, Situation, findings_dict
from gdpo_megatron.certify.family_models import MODELS, save_model
from gdpo_megatron.certify.job import Job
from gdpo_megatron.platform import Platform

_NUM_PROMPTS, _LENGTH = 2, 48


class LocalLayers:
    """A platform as it is, but for Transformer Engine, which it does not have."""

    def __init__(self, platform: Platform):
        self._platform = platform

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)

    def has_transformer_engine(self) -> bool:
        """Whether its layers can be used."""
        return False


def missing_engine(situation: Situation) -> str | None:
    """What the layers of Transformer Engine need."""
    if situation.platform.has_transformer_engine():
        return None
    return "needs a GPU and Transformer Engine"


def run_local(job: Job) -> Findings:
    """With Megatron's local layers."""
    return job.findings(f"{__name__}:on_rank", 1, local=True)


def run_transformer_engine(job: Job) -> Findings:
    """With Transformer Engine's, against the same transformers model."""
    return job.findings(f"{__name__}:on_rank", 1, local=False)


def on_rank(platform: Platform, folder: Path, *, local: bool) -> dict[str, Any]:
    """Compare all families; the bound is that of `verify`, which follows from rounding."""
    from gdpo_megatron.layer_values import open_model, read_prompts
    from gdpo_megatron.verify import compare_with_transformers

    where: Any = LocalLayers(platform) if local else platform
    measured: list[Measured] = []
    for name, config in MODELS.items():
        model = folder / "models" / name
        save_model(model, **config)
        arch, checkpoint = open_model(model)
        prompts = read_prompts(model, arch, (), num_prompts=_NUM_PROMPTS, length=_LENGTH, seed=0)
        rows = compare_with_transformers(model, checkpoint, arch, prompts, platform=where)
        logits = rows[-1]
        measured.append(Measured(f"{name}: logits", logits.relative, "<=", logits.allowed()))
    return findings_dict(measured)
