"""LoRA in plain torch on the transformers model: the formula once more, one row at a time.

    y = W x + b + alpha / rank * B (A x)

Layers that are one in Megatron share an A. No code of the package computes anything here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdpo_megatron.certify.layout_models import Rollouts
from gdpo_megatron.config.schema import OptimizerConfig

# The norm is clipped in every step, decay is large enough to be seen, and eps keeps Adam from
# making whole steps of gradients that are nothing but rounding (see test_layouts.py).
OPTIMIZER = OptimizerConfig(lr=5e-3, weight_decay=0.1, max_grad_norm=0.1, eps=1e-5)
MINIBATCHES = ((0, 1, 2), (3, 4, 5, 6), (8,), (9, 2, 4, 7))
"""Samples of each optimizer step; two data-parallel ranks meet an empty one."""

SHARING = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", local_files_only=True
    )
    return model.requires_grad_(False)


def add_adapters(model: Any, start: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Put adapters into a model.

    Args:
        model: of transformers.
        start: PEFT name -> tensor; layers that have none get none.
        scale: alpha / rank.

    Returns:
        The adapters by their PEFT names; shared ones are the same tensor.
    """
    adapters: dict[str, Tensor] = {}
    for number in range(model.config.num_hidden_layers):
        for modules in SHARING:
            paths = [f"model.layers.{number}.{module}" for module in modules]
            names = [f"base_model.model.{path}.lora" for path in paths]
            if f"{names[0]}_A.weight" not in start:
                continue
            a = start[f"{names[0]}_A.weight"].clone().requires_grad_()
            for path, name in zip(paths, names, strict=True):
                assert torch.equal(start[f"{name}_A.weight"], a)
                b = start[f"{name}_B.weight"].clone().requires_grad_()
                adapters |= {f"{name}_A.weight": a, f"{name}_B.weight": b}

                def add(_: Any, inputs: Any, y: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
                    return y + scale * (inputs[0] @ a.T) @ b.T

                model.get_submodule(path).register_forward_hook(add)
    return adapters


def logprobs(model: Any, row: tuple[Sequence[int], Sequence[int]]) -> Tensor:
    """Log-probs of a row's completion tokens, [T]."""
    prompt, completion = row
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    targets = torch.tensor(completion, dtype=torch.int64).unsqueeze(-1)
    return logits.log_softmax(-1).gather(-1, targets).squeeze(-1)


def updates(
    folder: Path, start: Mapping[str, Tensor], scale: float, rollouts: Rollouts
) -> dict[str, Any]:
    """Cross-entropy on each minibatch in turn; steps, adapters and log-probs at the end."""
    model = load(folder)
    adapters = add_adapters(model, start, scale)
    parameters = list({id(p): p for p in adapters.values()}.values())
    optimizer = torch.optim.AdamW(
        parameters,
        lr=OPTIMIZER.lr,
        betas=OPTIMIZER.betas,
        eps=OPTIMIZER.eps,
        weight_decay=OPTIMIZER.weight_decay,
    )
    steps: list[dict[str, float]] = []
    for samples in MINIBATCHES:
        total = sum(len(rollouts.completions[s]) for s in samples)
        rows = [rollouts.row(s) for s in samples if rollouts.completions[s]]
        loss = -torch.stack([logprobs(model, row).sum() for row in rows]).sum() / total
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, OPTIMIZER.max_grad_norm)
        optimizer.step()
        steps.append({"loss": float(loss.detach()), "grad_norm": float(norm)})
    with torch.no_grad():
        said = [logprobs(model, rollouts.row(s)) for s in range(len(rollouts.completions))]
    return {
        "steps": steps,
        "adapters": {name: tensor.detach().clone() for name, tensor in adapters.items()},
        "logprobs": dict(enumerate(said)),
    }
