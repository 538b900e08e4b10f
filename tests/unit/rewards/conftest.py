"""Fixtures of the reward tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from support.assets import needed
from support.told_suite import told  # noqa: F401 (a fixture)

from gdpo_megatron.rewards import REWARDS


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
