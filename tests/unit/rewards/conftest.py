"""Fixtures of the reward tests."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import told_time
from support.assets import needed

from gdpo_megatron.rewards import REWARDS
from gdpo_megatron.rewards import suite as suite_module


@pytest.fixture(scope="session")
def read_rows() -> Callable[[str], list[dict[str, Any]]]:
    """Reads the rows of a jsonl file under $GDPO_ASSETS/data; skips where it is absent."""

    def read(name: str) -> list[dict[str, Any]]:
        path = needed(f"data/{name}")
        # Not str.splitlines: it also splits at U+2028, which GSM8K has inside of strings.
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    return read


@pytest.fixture
def registry_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(REWARDS, "_entries", dict(REWARDS._entries))
    monkeypatch.setattr(REWARDS, "_entry_point_group", None)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Suites whose calls take as long as they say, see told_time.py."""
    monkeypatch.setenv(told_time.FOLDER, str(tmp_path_factory.mktemp("told")))
    command = (sys.executable, str(Path(__file__).with_name("told_pool.py")))
    monkeypatch.setattr(suite_module, "POOL_COMMAND", command)
