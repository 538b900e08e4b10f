"""A run's checkpoint is a model: converted, verified, generated from, trained on.

The run has two data-parallel ranks; other layouts are in tests/distributed/test_conversion.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.jobs import read_jsonl, succeed

from gdpo_megatron.config import yaml_text

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def checkpoint(sft: Path) -> Path:
    return sft / "checkpoints/step_00000008"


def test_converts_to_what_was_exported(sft: Path, checkpoint: Path, tmp_path: Path) -> None:
    succeed("convert", checkpoint, tmp_path / "hf", "--to", "hf")
    found, exported = (load_file(f / "model.safetensors") for f in (tmp_path / "hf", sft / "hf"))
    assert found.keys() == exported.keys()
    assert all((found[name] == exported[name]).all() for name in exported)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (sft / "hf" / name).read_bytes()


def test_verify(sft: Path, checkpoint: Path) -> None:
    output = succeed("verify", checkpoint, sft / "hf")
    assert "tensors are bit-identical" in output and ", within " in output


def test_generate(sft: Path, checkpoint: Path) -> None:
    texts = [
        succeed("generate", folder, "--prompt", "Call", "--max-completion-tokens", "8")
        for folder in (checkpoint, sft / "hf")
    ]
    assert texts[0] == texts[1] and texts[0].startswith("Call")


def test_training_starts_from_it(quickstart: Path, checkpoint: Path, sft: Path) -> None:
    """The first step is the one that the export gives, and the tokenizer comes along."""
    losses: list[Any] = []
    for name, folder in (("from_checkpoint", checkpoint), ("from_export", sft / "hf")):
        config = {
            "run_dir": name,
            "model": {"hf_path": str(folder), "max_sequence_length": 160},
            "data": {"train": "sft.jsonl"},
            "train": {"num_steps": 1, "global_batch_size": 16},
            "logging": {"tensorboard": False},
        }
        (quickstart / f"{name}.yaml").write_text(yaml_text.dump(config))
        succeed("sft", quickstart / f"{name}.yaml")
        losses += [row["sft/loss"] for row in read_jsonl(quickstart / name / "metrics.jsonl")]
    assert losses[0] == losses[1]
