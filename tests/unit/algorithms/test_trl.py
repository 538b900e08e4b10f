"""Preset `trl` against TRL itself: its trainer runs one step and is asked what it computed.

Skipped where TRL is not importable (it is no dependency; `pip install trl accelerate datasets` in
an environment of its own). TRL computes in float32, hence the tolerance; constant groups of values
that float32 cannot hold exactly are left out, since TRL scales their residue up to 1e-4 of a unit.
"""

from __future__ import annotations

import math
import random

import pytest
import torch

from gdpo_megatron.algorithms import compute_advantages
from gdpo_megatron.config.advantage import AdvantageConfig
from gdpo_megatron.types import RewardMatrix

trl = pytest.importorskip("trl", reason="TRL is not installed; needs an environment of its own")
pytest.importorskip("datasets", reason="TRL's trainer needs datasets")

NAMES = ("correct", "format", "length")
WEIGHTS = (1.0, 2.0, 0.5)


def scripted(column: list[float | None], name: str):
    """A TRL reward function that returns fixed scores; None where one is missing."""

    def reward(completions, **kwargs):
        return column[: len(completions)]

    reward.__name__ = name
    return reward


def run_trl(rows, group_size, aggregation, tmp_path):
    """One step of GRPOTrainer with a tiny random model; returns the advantages it logged."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "a", "b", "c", "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=1,
        )
    )
    config = trl.GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(rows),
        num_generations=group_size,
        max_completion_length=4,
        max_steps=1,
        multi_objective_aggregation=aggregation,
        reward_weights=list(WEIGHTS[: len(rows[0])]),
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        disable_dropout=True,
    )
    columns = list(zip(*rows, strict=True))
    rewards = [scripted(list(c), n) for c, n in zip(columns, NAMES, strict=False)]
    trainer = trl.GRPOTrainer(
        model=model,
        args=config,
        processing_class=fast,
        reward_funcs=rewards,
        train_dataset=Dataset.from_dict({"prompt": ["a b c"] * len(rows)}),
    )
    logged: list[float] = []
    original = trainer._generate_and_score_completions

    def spy(inputs):
        result = original(inputs)
        logged.extend(list(trainer._logs["advantages"])[-len(rows) :])
        return result

    trainer._generate_and_score_completions = spy
    trainer.train()
    return logged


def make_rows(seed: int, num_groups: int, group_size: int, missing: float):
    """Binary, stepped and real rewards in multiples of 1/64, exact in float32."""
    rng = random.Random(seed)

    def maybe(value):
        return None if rng.random() < missing else value

    rows = [
        [
            maybe(float(rng.random() < 0.5)),
            maybe(float(rng.randrange(-3, 4))),
            maybe(rng.randrange(64) / 64),
        ]
        for _ in range(num_groups * group_size)
    ]
    rows[:group_size] = [[1.0, 0.5, -2.0]] * group_size
    if missing:
        rows[-1] = [None, None, None]
    return rows


@pytest.mark.parametrize("missing", [0.0, 0.2])
@pytest.mark.parametrize("group_size", [2, 4, 8])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("aggregation", "config"),
    [
        ("normalize_then_sum", {"preset": "trl"}),
        # TRL sums a missing reward as 0; ours would take its group mean.
        ("sum_then_normalize", {"preset": "trl", "estimator": "grpo", "missing": "zero"}),
    ],
)
def test_same_advantages_as_trl(aggregation, config, seed, group_size, missing, tmp_path):
    rows = make_rows(seed, 5, group_size, missing)
    theirs = run_trl(rows, group_size, aggregation, tmp_path)
    values = torch.tensor([[math.nan if x is None else x for x in row] for row in rows])
    rewards = RewardMatrix(NAMES, values, ~values.isnan(), torch.arange(len(rows)) // group_size)
    weights = dict(zip(NAMES, WEIGHTS, strict=True))
    ours = compute_advantages(rewards, AdvantageConfig(weights=weights, **config)).advantages
    difference = float((ours - torch.tensor(theirs, dtype=torch.float64)).abs().max())
    print(f"\n{aggregation} G={group_size} missing={missing}: max |ours - TRL| = {difference:.1e}")
    assert float(ours.abs().max()) > 0.5
    assert difference < 2e-6
