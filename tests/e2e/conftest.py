"""The quickstart's data and a model warm-started on it, once per session."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from support.jobs import succeed

from gdpo_megatron.config import yaml_text

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the rows and the model config that examples/quickstart makes."""
    path = ROOT / "examples/quickstart/make_data.py"
    spec = importlib.util.spec_from_file_location("quickstart_make_data", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("quickstart")
    module.make_quickstart_data(folder, seed=1)
    # 16384 pairs take longer to tokenise than 8 steps take to train on them.
    lines = (folder / "sft.jsonl").read_text().splitlines(keepends=True)
    (folder / "sft.jsonl").write_text("".join(lines[:512]))
    return folder


@pytest.fixture(scope="session")
def sft(quickstart: Path) -> Path:
    """The run folder of 8 steps of SFT on two ranks."""
    config = {
        "run_dir": "sft",
        "model": {"hf_path": "model", "init": "random", "max_sequence_length": 160},
        "data": {"train": "sft.jsonl"},
        "train": {"num_steps": 8, "global_batch_size": 32},
        "optimizer": {"lr": 3e-3},
        "logging": {"tensorboard": False},
        "profiling": {"tool": "nvtx"},
    }
    (quickstart / "sft.yaml").write_text(yaml_text.dump(config))
    succeed("sft", quickstart / "sft.yaml", "--nproc", "2")
    return quickstart / "sft"
