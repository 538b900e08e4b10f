"""The small models and rollouts that layouts are compared on. Imports no Megatron.

Five layers make two pipeline stages uneven, 151 tokens make the vocabulary padded. "tied" is a
plain Llama; "untied" has its own output layer, a head size that is not hidden_size / heads, and
llama3 frequency scaling that leaves no frequency as it was.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdpo_megatron.config.loss import LossConfig, MismatchConfig
from gdpo_megatron.config.schema import OptimizerConfig
from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.hf_io import RandomWeights
from gdpo_megatron.conversion.hf_writer import write_hf_folder
from gdpo_megatron.conversion.mapping import hf_shapes
from gdpo_megatron.types import Prompt

MAX_LENGTH = 40
GROUP_SIZE = 2
NUM_MINIBATCHES = 3
TEMPERATURE = 0.8
MICRO_BATCH_SIZE = 2

LOSS = LossConfig(
    clip_eps_low=0.2,
    clip_eps_high=0.28,
    kl_coef=0.1,
    entropy_coef=0.01,
    mismatch=MismatchConfig(correction="token_truncate", max_importance_weight=1.5),
)
# The schedule is not flat, the norm is clipped, and decay is large enough to be seen.
# A larger eps: with the usual one a gradient that is nothing but rounding makes a whole step.
OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.1, max_grad_norm=0.25, eps=1e-6)

_COMMON = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 151,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.08,
    "hidden_act": "silu",
    "head_dim": 16,
}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {**_COMMON, "tie_word_embeddings": True, "rope_theta": 10000.0},
    "untied": {
        **_COMMON,
        "tie_word_embeddings": False,
        "head_dim": 24,
        "rope_theta": 500.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
}
_OTHERS = {**_COMMON, "num_hidden_layers": 3, "rope_theta": 10000.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {**_OTHERS, "model_type": "qwen2", "tie_word_embeddings": True},
    "llama": {**_OTHERS, "model_type": "llama", "tie_word_embeddings": False},
    "experts": {
        **_OTHERS,
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
}
"""What other families add to MODELS: biases, no norms of heads, experts."""


class TinyWeights(RandomWeights):
    """Random weights whose norms differ too, so that no two tensors can be mistaken.

    Args:
        arch: the model.
        distance: how far they are from those at distance 0, relative to their size.
    """

    def __init__(self, arch: ModelArchitecture, distance: float = 0.0):
        super().__init__(arch, 1)
        noise = torch.Generator().manual_seed(2)
        self._tensors: dict[str, Tensor] = {}
        for name, shape in hf_shapes(arch).items():
            tensor = super().get(name)
            if len(shape) == 1:
                tensor = tensor + 0.3 * torch.randn(shape, generator=noise)
            step = torch.randn(shape, generator=noise) * tensor.std()
            self._tensors[name] = tensor + distance * step

    def get(self, name: str) -> Tensor:
        return self._tensors[name]


def write_models(folder: Path, names: Iterable[str] = (*MODELS, *FAMILIES)) -> None:
    """Write <folder>/NAME for each model, and for each a reference with other weights."""
    for name in names:
        config = (MODELS | FAMILIES)[name]
        source = folder / f"{name}_config"
        source.mkdir(parents=True)
        (source / "config.json").write_text(json.dumps(config))
        arch = load_architecture(source)
        for target, distance in ((name, 0.0), (f"{name}_reference", 0.2)):
            weights = TinyWeights(arch, distance)
            write_hf_folder(
                folder / target,
                ((tensor_name, weights.get(tensor_name)) for tensor_name in hf_shapes(arch)),
                arch,
                dtype=torch.float32,
                source=source,
                save_tokenizer=lambda path: None,
            )


@dataclass(frozen=True)
class Rollouts:
    """A step's rollouts with everything that its updates need; rows by sample id.

    Args:
        prompts: one per group.
        completions: token ids of each sample.
        advantages: of each sample.
        loss_rows: samples that count.
        old_noise: per completion token, what is added to the policy's log-prob to make the old one.
        rollout_noise: the same for the engine's.
    """

    prompts: list[Prompt]
    completions: list[list[int]]
    advantages: Tensor
    loss_rows: Tensor
    old_noise: list[list[float]]
    rollout_noise: list[list[float]]

    @property
    def lengths(self) -> list[int]:
        return [len(completion) for completion in self.completions]

    def row(self, sample: int) -> tuple[tuple[int, ...], list[int]]:
        return self.prompts[sample // GROUP_SIZE].token_ids, self.completions[sample]


def make_rollouts() -> Rollouts:
    """Five groups of two, lengths 0 to 19; three minibatches, the last with one row.

    Two data-parallel ranks therefore meet an uneven split and then an empty rank.
    """
    draw = random.Random(7)
    lengths = [7, 3, 19, 1, 9, 4, 12, 0, 2, 15]
    completions = [[draw.randrange(151) for _ in range(n)] for n in lengths]
    loss_rows = torch.ones(10, dtype=torch.bool)
    loss_rows[5] = False
    return Rollouts(
        prompts=[
            Prompt(
                prompt_id=f"tiny:{i}",
                token_ids=tuple(draw.randrange(151) for _ in range(n)),
                text="",
            )
            for i, n in enumerate([5, 1, 12, 3, 8])
        ],
        completions=completions,
        advantages=torch.tensor([draw.gauss(0, 1) for _ in lengths]),
        loss_rows=loss_rows,
        old_noise=[[draw.uniform(-0.6, 0.6) for _ in range(n)] for n in lengths],
        rollout_noise=[[draw.uniform(-0.7, 0.7) for _ in range(n)] for n in lengths],
    )
