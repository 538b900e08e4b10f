"""Small random models of every family with a byte-level tokenizer, written by transformers itself.

Their weights are large enough that the next token is far from uniform: a wrong rotation, head or
padding row then shows in the first token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 300  # no multiple of 64: the last TP rank holds padding
EOS, PAD = 1, 0

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

MODELS: dict[str, dict[str, Any]] = {
    "gqa": {"model_type": "llama", "tie_word_embeddings": False},
    "mha": {"model_type": "llama", "num_key_value_heads": 4, "tie_word_embeddings": False},
    "tied": {"model_type": "llama", "num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama3_rope": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": _LLAMA3_ROPE,
    },
    "mistral": {"model_type": "mistral", "head_dim": 24, "sliding_window": None},
    "qwen2_tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen3_tied": {"model_type": "qwen3", "head_dim": 24, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": False},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 24,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        **_EXPERTS,
    },
    "qwen3_moe_raw_weights": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "moe_intermediate_size": 48,
        "norm_topk_prob": False,
        **_EXPERTS,
    },
    "mixtral": {"model_type": "mixtral", **_EXPERTS},
}
"""Name -> what differs from `save_model`'s own config."""


def save_model(folder: Path, model_type: str, **config: Any) -> None:
    """Write a model folder: config, weights, generation config, tokenizer.

    Args:
        folder: created if needed.
        model_type: of transformers.
        config: fields of its config class, over 2 layers of 4 heads of size 16.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **(fields | config))
    )
    with torch.no_grad():
        # Norms of 1 and biases of 0 would hide one that is applied twice or not at all.
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    model.save_pretrained(folder)
    save_tokenizer(folder)


def save_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE tokenizer of at most VOCAB_SIZE tokens; it adds no begin token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the hat"] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def reference_model(folder: Path) -> Any:
    """Transformers' model of a folder in float64, with its plainest attention."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",
        local_files_only=True,
    )
    return model.eval()


@torch.no_grad()
def reference_logits(model: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Any:
    """Logits that each completion token was drawn from, float64 [T, V]."""
    tokens = torch.tensor([prompt + completion])
    return model(tokens).logits[0, len(prompt) - 1 : -1]
