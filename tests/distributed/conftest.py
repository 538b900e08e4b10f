"""Tiny models and what plain torch makes of them, once per session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import layouts
import plain_torch
import pytest

from gdpo_megatron.certify.layout_models import FAMILIES, MODELS, make_rollouts, write_models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the models that layouts are compared on."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture(scope="session")
def plain(models: Path) -> dict[str, dict[str, Any]]:
    """For each model: log-probs of transformers, and the updates of plain_torch.py."""
    rollouts = make_rollouts()
    return {
        name: {
            "logprobs": plain_torch.all_logprobs(plain_torch.load(models / name), rollouts),
            **plain_torch.updates(models / name, models / f"{name}_reference", rollouts),
        }
        for name in MODELS | FAMILIES
    }


@pytest.fixture(scope="session")
def engine_logprobs(plain: dict[str, dict[str, Any]]) -> dict[str, list[list[float]]]:
    """What the engine is said to have had: the model's log-probs with noise, by sample."""
    return layouts.engine_logprobs(plain)
