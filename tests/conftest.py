"""What tests of several folders share; its place puts `support` on the import path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from support.assets import needed

from gdpo_megatron.certify.family_models import MODELS, save_model

# The same examples each time, however long they take: whether a change is at fault is not to depend
# on luck or on what else the machine does. New ones: pytest --hypothesis-profile=random.
_UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("random", _UNTIMED)
settings.register_profile("same", _UNTIMED, derandomize=True)
settings.load_profile("same")


@pytest.fixture(scope="session")
def stories_folder() -> Path:
    """The stories260K model; skips where it is absent."""
    return needed("models/stories260K")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a small random model by its name in `family_models.MODELS`; made once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            save_model(made[name], **MODELS[name])
        return made[name]

    return folder
