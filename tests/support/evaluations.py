"""The `eval` job in this process: one rank, an engine that answers by heart, no Megatron."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gdpo_megatron.platform import detect_platform

detect_platform().prepare_megatron()  # the job's modules import Megatron

from gdpo_megatron.certify.family_models import EOS, save_model  # noqa: E402
from gdpo_megatron.config import yaml_text  # noqa: E402
from gdpo_megatron.config.loader import load_config  # noqa: E402
from gdpo_megatron.config.schema import RLConfig, RolloutConfig  # noqa: E402
from gdpo_megatron.conversion.families import load_architecture  # noqa: E402
from gdpo_megatron.conversion.hf_io import HFCheckpoint  # noqa: E402
from gdpo_megatron.data.tokenizer import load_tokenizer  # noqa: E402
from gdpo_megatron.evaluation.job import run_eval  # noqa: E402
from gdpo_megatron.rollout.base import engines  # noqa: E402
from support.engines import ONE_RANK, engine_setup, one_rank  # noqa: E402

ENGINE = f"{Path(__file__).with_name('answering_engine.py')}:answering_engine"
CONTEXT = 32768


def save_answering_model(folder: Path, answers: Mapping[str, Sequence[str]]) -> None:
    """A model folder whose engine answers by heart; its weights are small and of no use."""
    save_model(folder, "llama", max_position_embeddings=CONTEXT)
    (folder / "answers.json").write_text(json.dumps(answers))


def write_config(folder: Path, **sections: Any) -> Path:
    """A config of an evaluation with that engine, the model in `model`."""
    config = {
        "run_dir": "run",
        "model": {"hf_path": "model", "max_sequence_length": CONTEXT},
        "rollout": {"engine": ENGINE},
        **sections,
    }
    path = folder / "config.yaml"
    path.write_text(yaml_text.dump(config))
    return path


def evaluate(path: Path, *overrides: str) -> bool:
    """Run the job; returns whether it is complete."""
    config = load_config(RLConfig, path, overrides)
    base_dir = path.parent
    folder = base_dir / config.model.hf_path
    arch, tokenizer = load_architecture(folder), load_tokenizer(folder)

    def make_engine(rollout: RolloutConfig, max_concurrent_sequences: int) -> Any:
        return engines.get(rollout.engine, base_dir)(engine_setup(folder)), ONE_RANK

    parts: Any = SimpleNamespace(
        platform=detect_platform(),
        mesh=SimpleNamespace(rank=0),
        folder=folder,
        arch=arch,
        tokenizer=tokenizer,
        engine=make_engine,
        environment=lambda *arguments: None,
        stop_token_ids=lambda: (EOS,),
        reader=lambda: HFCheckpoint(folder, arch),
    )
    with one_rank():
        return run_eval(config, base_dir, parts)
