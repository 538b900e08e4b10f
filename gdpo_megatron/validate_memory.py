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
        problems += _modules(config, arch) + _units(config.memory, config.parallel, arch)
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


def _modules(config: RLConfig | SFTConfig, arch: ModelArchitecture) -> list[str]:
    modules, experts = config.memory.recompute_modules or (), arch.moe is not None
    problems: list[str] = []
    absent, present = ("mlp", "moe") if experts else ("moe", "mlp")
    if absent in modules:
        what = "layers are all mixtures of experts" if experts else "layers have no experts"
        problems.append(
            f"memory.recompute_modules: '{absent}' would do nothing, {arch.family}'s {what}; "
            f"take {present}"
        )
    several = config.parallel.context_parallel_size > 1 or config.train.packing
    if "core_attn" in modules and not several:
        problems.append(
            "memory.recompute_modules: 'core_attn' would give nothing back: attention keeps its "
            "inputs and its result, which its neighbours keep too; only the keys of other ranks "
            "(parallel.context_parallel_size) and the results of single rows (train.packing) are "
            f"its own; take {present}"
        )
    return problems


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
