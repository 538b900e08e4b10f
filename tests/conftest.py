"""What tests of several folders share; its place puts `support` on the import path."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.models import LLAMAS, save_llama

ASSETS = Path(os.environ.get("GDPO_ASSETS", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(scope="session")
def stories_folder() -> Path:
    """The stories260K model; skips where it is absent."""
    folder = ASSETS / "models/stories260K"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"needs {folder}; set GDPO_ASSETS")
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a small random Llama by its name in `support.models.LLAMAS`; made once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            save_llama(made[name], **LLAMAS[name])
        return made[name]

    return folder
