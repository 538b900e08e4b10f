"""Where vLLM's models have the points of rollout/observe.py.

Their layers hand on what they add and the stream before it; the norm that follows joins the two, in
place. All families here are written in this way (vllm/model_executor/models/llama.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdpo_megatron.rollout.observe import (
    EMBEDDING,
    FINAL_NORM,
    LOGITS,
    Take,
    after_attention,
    after_mlp,
    returned,
)


def points(model: Any) -> dict[str, tuple[torch.nn.Module, Take]]:
    """Each point's module, and where in it the value is."""
    decoder = model.model
    found: dict[str, tuple[torch.nn.Module, Take]] = {EMBEDDING: (decoder.embed_tokens, returned)}
    for index, layer in enumerate(decoder.layers):
        found[after_attention(index)] = (layer.post_attention_layernorm, _stream)
        found[after_mlp(index)] = (layer, _sum)
    found[FINAL_NORM] = (decoder.norm, returned)
    found[LOGITS] = (model.logits_processor, returned)
    return found


def _stream(_: Any, output: Any) -> Tensor:
    return output[1]


def _sum(_: Any, output: Any) -> Tensor:
    added, stream = output
    return added + stream
