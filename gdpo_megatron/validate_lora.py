"""What can be known to be wrong about `model.lora` before a rank is started (see validate.py)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gdpo_megatron.config import yaml_text
from gdpo_megatron.config.fields import show
from gdpo_megatron.config.paths import resolve_path
from gdpo_megatron.config.schema import RLConfig, SFTConfig
from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.conversion.peft_writer import lora_targets
from gdpo_megatron.run_folder import CONFIG_FILE


def lora_problems(
    job: str, config: RLConfig | SFTConfig, base_dir: Path, arch: ModelArchitecture | None
) -> list[str]:
    """Problems of the section, of its model and of its run folder.

    Args:
        job: "train", "sft" or "eval"; the last one has no use for adapters.
        config: the loaded config.
        base_dir: folder that its relative paths start from.
        arch: of the model; None where it could not be read.
    """
    lora, problems = config.model.lora, list[str]()
    if job == "eval":
        return problems
    if lora is not None and config.model.init == "random":
        problems.append(
            "model.init is random: adapters would belong to weights that are in no model folder; "
            "set model.lora: null, or model.init: pretrained"
        )
    if lora is not None and arch is not None:
        available = lora_targets(arch)
        wrong = [target for target in lora.target_modules if target not in available]
        if wrong:
            why = ", whose experts get no adapters" if arch.moe else ""
            problems.append(
                f"model.lora.target_modules: {arch.family} has no {', '.join(wrong)}{why}; "
                f"choices: {', '.join(available)}"
            )
    return problems + _resume_problems(config, base_dir)


def _resume_problems(config: RLConfig | SFTConfig, base_dir: Path) -> list[str]:
    """A checkpoint has the adapters that its run had, and they mean something with its alpha."""
    run_dir = resolve_path(base_dir, config.run_dir)
    recorded = run_dir / CONFIG_FILE
    if not recorded.is_file() or not any(run_dir.glob("checkpoints/step_*/run.json")):
        return []
    model = yaml_text.read_mapping(recorded, []).get("model")
    before = model.get("lora") if isinstance(model, dict) else None
    lora = config.model.lora
    now = None if lora is None else json.loads(json.dumps(asdict(lora)))
    if before == now:
        return []
    return [
        f"model.lora: the checkpoints in {run_dir} were made with {_in_words(before)}, the config "
        f"says {_in_words(now)}; go on as before, or with another run_dir"
    ]


def _in_words(lora: Mapping[str, Any] | None) -> str:
    if lora is None:
        return "null"
    return ", ".join(f"{key} {show(value)}" for key, value in lora.items())
