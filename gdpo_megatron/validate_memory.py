"""What can be known to be wrong about `memory` before a rank is started (see validate.py)."""

from __future__ import annotations

from gdpo_megatron.algorithms import needs_reference
from gdpo_megatron.config.memory import MemoryConfig
from gdpo_megatron.config.schema import ParallelConfig, RLConfig, SFTConfig
from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.conversion.pipeline import stage_layers
from gdpo_megatron.errors import InputError


def memory_problems(
    job: str, config: RLConfig | SFTConfig, arch: ModelArchitecture | None
) -> list[str]:
    """Keys that would have no effect, and those that Megatron could not follow.

    Args:
        job: "train", "sft" or "eval"; the last one updates nothing.
        config: the loaded config.
        arch: of the model; None where it could not be read.
    """
    problems: list[str] = []
    if job == "eval":
        return problems
    if arch is not None:
        problems += _modules(config.memory, arch) + _units(config.memory, config.parallel, arch)
    if isinstance(config, RLConfig) and config.memory.reference == "swap":
        if config.model.lora is not None:
            problems.append(
                "memory.reference is swap, but the reference of a model.lora run is the policy "
                "without its adapters, which takes no memory; leave it out"
            )
        elif not needs_reference(config.loss):
            problems.append(
                "memory.reference is swap, but the loss asks no reference: loss.kl_coef is "
                f"{config.loss.kl_coef:g}; leave it out"
            )
    return problems


def _modules(memory: MemoryConfig, arch: ModelArchitecture) -> list[str]:
    modules, experts = memory.recompute_modules or (), arch.moe is not None
    absent, choices = ("mlp", "core_attn, moe") if experts else ("moe", "core_attn, mlp")
    if absent not in modules:
        return []
    what = "layers are all mixtures of experts" if experts else "layers have no experts"
    return [
        f"memory.recompute_modules: '{absent}' would do nothing, {arch.family}'s {what}; "
        f"choices: {choices}"
    ]


def _units(memory: MemoryConfig, parallel: ParallelConfig, arch: ModelArchitecture) -> list[str]:
    """Megatron walks past the end of a stage that is not a whole number of units."""
    key, number = "memory.recompute_num_layers", memory.recompute_num_layers
    if number is None:
        return []
    try:
        stages = stage_layers(arch.num_layers, parallel)
    except InputError:  # told already
        return []
    if memory.recompute_method == "uniform" and any(layers % number for layers in stages):
        return [
            f"{key} {number} does not divide the layers of every pipeline stage, {list(stages)}, "
            "which recompute_method uniform needs; take a divisor, or block"
        ]
    if number > max(stages):
        return [f"{key} is {number}, but no pipeline stage has more than {max(stages)} layers"]
    return []
