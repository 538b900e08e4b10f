"""Jobs to plan: shapes of published models, and configs around a shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from gdpo_megatron.planning.job import Job, load_job
from support.published_models import PUBLISHED

SHAPES: dict[str, dict[str, Any]] = {
    **PUBLISHED,
    "Qwen2.5-7B": PUBLISHED["Qwen2.5-7B-Instruct"],
    "Llama-3.1-70B": PUBLISHED["Llama-3.1-70B-Instruct"],
    "Qwen3-235B-A22B": {
        **PUBLISHED["Qwen3-30B-A3B-Instruct-2507"],
        "hidden_size": 4096,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
    },
}
"""Name -> config.json."""


def save_shape(folder: Path, name: str, **changes: Any) -> Path:
    """Write the config.json of a name of SHAPES, changed; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[name] | changes))
    return folder


def save_job(folder: Path, name: str, config: dict[str, Any], **changes: Any) -> Path:
    """Write a `train` config about a shape; returns its path.

    Args:
        folder: of both.
        name: of SHAPES.
        config: sections that differ from a plain run's.
        **changes: of the shape.
    """
    save_shape(folder, name, **changes)
    plain: dict[str, Any] = {
        "run_dir": "runs/planned",
        "model": {"hf_path": ".", "max_sequence_length": 4096},
        "data": {"train": "prompts.jsonl"},
        "rewards": [{"name": "length", "type": "length_limit"}],
        "precision": {"params_dtype": "bfloat16"},
        "rollout": {"num_prompts_per_step": 128, "group_size": 8, "max_completion_tokens": 3072},
        "train": {"micro_batch_size": 1},
    }
    for key, section in config.items():
        both = isinstance(section, dict) and isinstance(plain.get(key), dict)
        plain[key] = plain[key] | section if both else section
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


def plan_job(
    folder: Path, name: str, world_size: int, config: dict[str, Any] | None = None, **changes: Any
) -> Job:
    """A job about a shape, checked as `plan` does."""
    return load_job(save_job(folder, name, config or {}, **changes), [], world_size=world_size)
