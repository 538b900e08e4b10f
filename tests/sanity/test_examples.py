"""Every example config loads and passes validation, and no key of the schema is dead.

Not covered: that the examples learn something (the README says what was measured), and that a key
which is read has the right effect (the tests of its module).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.assets import needed

from gdpo_megatron.config.fields import walk
from gdpo_megatron.config.loader import load_config
from gdpo_megatron.config.schema import RLConfig, SFTConfig
from gdpo_megatron.validate import validate

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(ROOT.glob("examples/**/*.yaml"))


def _load(path: Path) -> RLConfig | SFTConfig:
    return load_config(SFTConfig if path.stem == "sft" else RLConfig, path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_example_loads(path: Path):
    assert _load(path).run_dir.startswith("../../runs/")


def test_there_are_examples():
    assert len(CONFIGS) >= 5


def test_example_on_assets_is_valid():
    needed("models/stories260K")
    path = ROOT / "examples/stories/gdpo.yaml"
    validate("train", _load(path), path.parent, world_size=2)


def _unread_keys(source: str) -> list[str]:
    """Keys of both schemas that no attribute access in `source` names."""
    read = set(re.findall(r"\.([a-z_0-9]+)\b", source))
    paths = {path for root in (RLConfig, SFTConfig) for path, _ in walk(root)}
    return sorted(path for path in paths if path.split(".")[-1].removesuffix("[]") not in read)


def test_every_key_is_read():
    files = [
        path for path in (ROOT / "gdpo_megatron").rglob("*.py") if path.parent.name != "config"
    ]
    source = "\n".join(path.read_text() for path in files)
    # A preset is used up when the section is built: it fills the other keys.
    assert _unread_keys(source) == ["advantage.preset"]
    # The check sees a key that nothing reads.
    assert "optimizer.lr" in _unread_keys(re.sub(r"\.lr\b", ".rate", source))
