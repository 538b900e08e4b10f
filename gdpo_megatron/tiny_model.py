"""Model folders made by code: a tokenizer trained on given texts and the config of a small model.

For runs on a laptop and for tests, where no published checkpoint is at hand. The folder holds no
weights: `model.init: random` draws them. `train_bpe` alone is for a tokenizer with its own rules.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Padding, and what a turn of a chat begins and ends with, by Qwen's names."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML: what Qwen's models read. Unlike theirs it adds no system message of its own."""

# A word keeps the space before it, a digit stands alone, so that numbers are spelt in one way.
PIECES = r"\p{N}| ?[\p{L}_]+|\n+| ?[^\s\p{L}\p{N}_]+|[^\S\n]+"


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyShape:
    """Shape of a small Qwen2 model with tied embeddings.

    With the defaults it has 0.9 million parameters and 128 for each token of the vocabulary.
    """

    hidden_size: int = 128
    num_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    intermediate_size: int = 448
    max_positions: int = 4096


def train_bpe(
    texts: Iterable[str], *, vocab_size: int, special_tokens: Sequence[str], pieces: str
) -> Any:
    """Train a byte-level BPE.

    Args:
        texts: what to learn it from.
        vocab_size: at most so many tokens, the special ones and the 256 bytes among them.
        special_tokens: get the ids from 0 on.
        pieces: regular expression; tokens never cross the border of two of its matches.

    Returns:
        A `tokenizers.Tokenizer`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path, **config: Any) -> None:
    """Write the files of a tokenizer.

    Args:
        tokenizer: of `train_bpe`.
        folder: exists.
        config: fields of tokenizer_config.json: eos_token, chat_template and so on.
    """
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **config,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", fields)


def save_chat_tokenizer(
    folder: Path,
    texts: Iterable[str],
    *,
    vocab_size: int,
    max_positions: int,
    pieces: str = PIECES,
) -> int:
    """Train a tokenizer with special tokens and chat template as Qwen's, and write its files.

    Returns:
        The size of its vocabulary: `vocab_size`, or less where the texts give no more.
    """
    pad, _, end = SPECIAL_TOKENS
    tokenizer = train_bpe(
        texts, vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, pieces=pieces
    )
    save_tokenizer(
        tokenizer,
        folder,
        pad_token=pad,
        eos_token=end,
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_positions,
    )
    return tokenizer.get_vocab_size()


def make_tiny_model(
    folder: Path,
    texts: Iterable[str],
    *,
    vocab_size: int,
    shape: TinyShape | None = None,
    pieces: str = PIECES,
) -> int:
    """Write a model folder without weights: config, generation config, tokenizer.

    Args:
        folder: created if needed; files of these names are replaced.
        texts: what the tokenizer is trained on; the same texts give the same bytes.
        vocab_size: at most so many tokens.
        shape: of the model; default TinyShape().
        pieces: regular expression; tokens never cross the border of two of its matches.

    Returns:
        The size of the vocabulary.
    """
    shape = shape or TinyShape()
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = save_chat_tokenizer(
        folder,
        texts,
        vocab_size=vocab_size,
        max_positions=shape.max_positions,
        pieces=pieces,
    )
    pad, _, end = (SPECIAL_TOKENS.index(token) for token in SPECIAL_TOKENS)
    special = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": pad}
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "max_position_embeddings": shape.max_positions,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.04,  # 0.02 is for wide models and learns slowly here
        "torch_dtype": "float32",
        **special,
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {**special, "eos_token_id": [end, pad]})
    return vocab_size


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object, indented."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
