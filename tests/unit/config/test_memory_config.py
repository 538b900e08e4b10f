"""The `memory` section: what is refused, in which words, before a rank is started.

That the keys do what they say is in tests/distributed/test_memory.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from gdpo_megatron.config.lora import LoraConfig
from gdpo_megatron.config.loss import LossConfig
from gdpo_megatron.config.memory import MemoryConfig, RLMemoryConfig
from gdpo_megatron.config.schema import (
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RLConfig,
    SFTConfig,
    TrainConfig,
)
from gdpo_megatron.validate_memory import memory_problems

MLP = {"recompute_granularity": "selective", "recompute_modules": ("mlp",)}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"recompute_granularity": "full"}, "recompute_granularity full needs recompute_method"),
        (
            {"recompute_granularity": "full", "recompute_method": "block"},
            "recompute_granularity full needs recompute_num_layers",
        ),
        ({"recompute_granularity": "selective"}, "selective needs recompute_modules: core_attn"),
        ({"recompute_method": "block"}, "recompute_method is block: it has a meaning for full"),
        (
            {**MLP, "recompute_num_layers": 2},
            "recompute_num_layers is 2: it has a meaning for full",
        ),
        ({**FULL, "recompute_modules": ("mlp",)}, "recompute_modules have a meaning for selective"),
        (
            {"recompute_granularity": "selective", "recompute_modules": ()},
            "recompute_granularity selective needs recompute_modules",
        ),
        (
            {"recompute_granularity": "selective", "recompute_modules": ("mlp", "mlp")},
            "recompute_modules names a module twice",
        ),
        (
            {"recompute_granularity": "selective", "recompute_modules": ("layernorm",)},
            "Input should be 'core_attn', 'mlp' or 'moe'",
        ),
        ({"logprob_chunk_tokens": 0}, "greater than 0"),
        ({"recompute_num_layers": 0}, "greater than 0"),
    ],
)
def test_refused_alone(section: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        MemoryConfig(**section)


def config(memory: RLMemoryConfig, **other: Any) -> RLConfig:
    return RLConfig(
        run_dir="run",
        data=DataConfig(train="rows.jsonl"),
        rewards=(),
        memory=memory,
        **{"model": ModelConfig(hf_path="model"), "loss": LossConfig(kl_coef=0.1), **other},
    )


def arch(*, experts: bool = False) -> Any:
    return SimpleNamespace(num_layers=6, moe=object() if experts else None, family="tiny")


@pytest.mark.parametrize(
    ("memory", "other", "experts", "problem"),
    [
        (
            {**MLP, "recompute_modules": ("mlp", "moe")},
            {},
            False,
            "'moe' would do nothing, tiny's layers have no experts; take mlp",
        ),
        (
            {**MLP, "recompute_modules": ("core_attn", "mlp")},
            {},
            False,
            "'core_attn' would give nothing back",
        ),
        (
            MLP,
            {},
            True,
            "'mlp' would do nothing, tiny's layers are all mixtures of experts",
        ),
        (
            {**FULL, "recompute_num_layers": 2},
            {"parallel": ParallelConfig(pipeline_model_parallel_size=2)},
            False,
            "recompute_num_layers 2 does not divide the layers of every pipeline stage, [3, 3]",
        ),
        (
            {**FULL, "recompute_method": "block", "recompute_num_layers": 4},
            {"parallel": ParallelConfig(pipeline_model_parallel_size=2)},
            False,
            "recompute_num_layers is 4, but no pipeline stage has more than 3 layers",
        ),
        (
            {"reference": "swap"},
            {"model": ModelConfig(hf_path="model", lora=LoraConfig())},
            False,
            "the reference of a model.lora run is the policy",
        ),
        (
            {"reference": "swap"},
            {"loss": LossConfig(kl_coef=0.0)},
            False,
            "the loss asks no reference: loss.kl_coef is 0",
        ),
    ],
)
def test_refused_together(
    memory: dict[str, Any], other: dict[str, Any], experts: bool, problem: str
) -> None:
    whole = config(RLMemoryConfig(**memory), **other)
    (found,) = memory_problems("train", whole, arch(experts=experts))
    assert found.startswith("memory.") and problem in found
    assert memory_problems("eval", whole, arch(experts=experts)) == []


@pytest.mark.parametrize(
    ("memory", "other"),
    [
        ({}, {}),
        (FULL, {}),
        ({**FULL, "recompute_num_layers": 3}, {}),
        ({**FULL, "recompute_method": "block", "recompute_num_layers": 2}, {}),
        (MLP, {}),
        (
            {**MLP, "recompute_modules": ("core_attn", "mlp")},
            {"parallel": ParallelConfig(context_parallel_size=2)},
        ),
        ({**MLP, "recompute_modules": ("core_attn",)}, {"train": TrainConfig(packing=True)}),
        ({"logprob_chunk_tokens": 64, "free_grad_buffers_during_rollout": True}, {}),
        ({"reference": "swap"}, {}),
    ],
)
def test_accepted(memory: dict[str, Any], other: dict[str, Any]) -> None:
    assert memory_problems("train", config(RLMemoryConfig(**memory), **other), arch()) == []


def test_sft_has_no_keys_of_a_rollout() -> None:
    with pytest.raises(ValidationError):
        SFTConfig(
            run_dir="run",
            model=ModelConfig(hf_path="model"),
            data=DataConfig(train="rows.jsonl"),
            memory=MemoryConfig(reference="swap"),  # pyright: ignore[reportCallIssue]
        )
