"""Folders with the shapes of published checkpoints, without their weights.

config.json has the published numbers; the safetensors files have the headers of real ones, tensor
by tensor, and nothing but holes behind them, so they take no room on the disk. Shapes come from
transformers' own models on the meta device, those of experts from their published layout. The
tokenizer is a small one of ours, with Qwen's chat format.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from gdpo_megatron.tiny_model import save_chat_tokenizer

_QWEN2 = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "use_sliding_window": False}
_QWEN3 = {"model_type": "qwen3", "rms_norm_eps": 1e-6, "use_sliding_window": False, "head_dim": 128}


def _shape(
    hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int, *, tied: bool
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "torch_dtype": "bfloat16",
    }


PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen2.5-1.5B-Instruct": {
        **_QWEN2,
        **_shape(1536, 28, 12, 2, 8960, 151936, tied=True),
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
    },
    "Qwen2.5-3B-Instruct": {
        **_QWEN2,
        **_shape(2048, 36, 16, 2, 11008, 151936, tied=True),
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
    },
    "Qwen2.5-7B-Instruct": {
        **_QWEN2,
        **_shape(3584, 28, 28, 4, 18944, 152064, tied=False),
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
    },
    "DeepSeek-R1-Distill-Qwen-1.5B": {
        **_QWEN2,
        **_shape(1536, 28, 12, 2, 8960, 151936, tied=False),
        "max_position_embeddings": 131072,
        "rope_theta": 10000.0,
        "eos_token_id": 151643,
    },
    "DeepSeek-R1-Distill-Qwen-7B": {
        **_QWEN2,
        **_shape(3584, 28, 28, 4, 18944, 152064, tied=False),
        "max_position_embeddings": 131072,
        "rope_theta": 10000.0,
        "eos_token_id": 151643,
    },
    "Qwen3-4B-Instruct-2507": {
        **_QWEN3,
        **_shape(2560, 36, 32, 8, 9728, 151936, tied=True),
        "max_position_embeddings": 262144,
        "rope_theta": 5000000.0,
    },
    "Qwen3-30B-A3B-Instruct-2507": {
        **_QWEN3,
        **_shape(2048, 48, 32, 4, 6144, 151936, tied=False),
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 262144,
        "rope_theta": 10000000.0,
    },
    "Llama-3.1-70B-Instruct": {
        **_shape(8192, 80, 64, 8, 28672, 128256, tied=False),
        "model_type": "llama",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
    },
}
"""Folder name -> config.json of the checkpoint of that name."""

_FILE_BYTES = 4 * 10**9

NUM_PARAMETERS = {
    "Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen2.5-7B-Instruct": 7_615_616_512,
    "DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "Qwen3-4B-Instruct-2507": 4_022_468_096,
    "Qwen3-30B-A3B-Instruct-2507": 30_532_122_624,
    "Llama-3.1-70B-Instruct": 70_553_706_496,
}
"""What the model cards and the weight files of the checkpoints say."""


def published_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Tensors of the checkpoint's weight files, by name."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(PUBLISHED[name])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    if "num_experts" in fields:  # transformers holds them stacked; files hold each by itself
        shapes = {key: shape for key, shape in shapes.items() if ".mlp.experts." not in key}
        hidden, ffn = fields["hidden_size"], fields["moe_intermediate_size"]
        for layer in range(fields["num_hidden_layers"]):
            for expert in range(fields["num_experts"]):
                prefix = f"model.layers.{layer}.mlp.experts.{expert}."
                shapes[f"{prefix}gate_proj.weight"] = (ffn, hidden)
                shapes[f"{prefix}up_proj.weight"] = (ffn, hidden)
                shapes[f"{prefix}down_proj.weight"] = (hidden, ffn)
    return shapes


def save_published_model(folder: Path, name: str) -> None:
    """Write a folder for a name of `PUBLISHED`; it is created."""
    folder.mkdir(parents=True)
    fields = PUBLISHED[name]
    (folder / "config.json").write_text(json.dumps(fields, indent=2))
    ends = {"eos_token_id": fields["eos_token_id"]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    texts = ["What is the sum of two and three? Think, then answer."]
    save_chat_tokenizer(folder, texts, vocab_size=400, max_positions=8192)
    _save_headers(folder, published_shapes(name))


def _save_headers(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Weight files of at most 4 GB, as checkpoints have them, and their index."""
    files: list[dict[str, Any]] = []
    end = _FILE_BYTES
    for key, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if end + size > _FILE_BYTES:
            files.append({})
            end = 0
        files[-1][key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    weight_map: dict[str, str] = {}
    for number, header in enumerate(files, start=1):
        file_name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        weight_map |= dict.fromkeys(header, file_name)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file_name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + max(it["data_offsets"][1] for it in header.values()))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
