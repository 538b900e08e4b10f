"""The fixture for told_time.py; apart from it, for a worker loads that and is to stay small."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gdpo_megatron.rewards import suite
from support import told_time

_TESTS = str(Path(__file__).parents[1])
POOL_COMMAND = (
    sys.executable,
    "-c",
    f"import sys; sys.path.insert(0, {_TESTS!r})\n"
    "from support import told_pool; told_pool.pool.main()",
)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Suites whose calls take as long as they say."""
    monkeypatch.setenv(told_time.FOLDER, str(tmp_path_factory.mktemp("told")))
    monkeypatch.setattr(suite, "POOL_COMMAND", POOL_COMMAND)
