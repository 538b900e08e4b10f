"""The same updates in plain torch on the transformers model: one row at a time, no padding.

The formulas are written out here once more, from the paper of each term, so that the policy is
compared with something that shares no code with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdpo_megatron.certify.layout_models import (
    GROUP_SIZE,
    LOSS,
    NUM_MINIBATCHES,
    OPTIMIZER,
    TEMPERATURE,
    Rollouts,
)


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        local_files_only=True,
    )


def completion_logprobs(model: Any, row: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
    """(log-probs, entropy) of a row's completion tokens, [T] each."""
    prompt, completion = row
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    log_p = (logits / TEMPERATURE).log_softmax(-1)
    own = log_p.gather(-1, torch.tensor(completion, dtype=torch.int64).unsqueeze(-1)).squeeze(-1)
    return own, -(log_p.exp() * log_p).sum(-1)


@torch.no_grad()
def all_logprobs(model: Any, rollouts: Rollouts) -> list[Tensor]:
    """Log-probs of every sample's completion."""
    samples = range(len(rollouts.completions))
    return [completion_logprobs(model, rollouts.row(s))[0] for s in samples]


def updates(folder: Path, reference_folder: Path, rollouts: Rollouts) -> dict[str, Any]:
    """All minibatches of a step; returns losses, gradient norms and the weights at the end."""
    model = load(folder)
    initial = all_logprobs(model, rollouts)
    old = [x + torch.tensor(noise) for x, noise in zip(initial, rollouts.old_noise, strict=True)]
    ref = all_logprobs(load(reference_folder), rollouts)
    engine = [
        x + torch.tensor(noise) for x, noise in zip(initial, rollouts.rollout_noise, strict=True)
    ]
    decayed = [p for p in model.parameters() if p.ndim > 1]
    exempt = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": OPTIMIZER.weight_decay},
            {"params": exempt, "weight_decay": 0.0},
        ],
        lr=OPTIMIZER.lr,
        betas=OPTIMIZER.betas,
        eps=OPTIMIZER.eps,
    )
    losses, norms = [], []
    for minibatch in range(NUM_MINIBATCHES):
        samples = [
            s
            for s in range(len(rollouts.completions))
            if s // GROUP_SIZE % NUM_MINIBATCHES == minibatch
            and rollouts.loss_rows[s]
            and rollouts.completions[s]
        ]
        total = torch.zeros(())
        for s in samples:
            logprobs, entropy = completion_logprobs(model, rollouts.row(s))
            ratio = (logprobs - old[s]).exp()
            bounded = ratio.clamp(1 - LOSS.clip_eps_low, 1 + LOSS.clip_eps_high)
            a = rollouts.advantages[s]
            surrogate = torch.minimum(ratio * a, bounded * a)
            weight = (old[s] - engine[s]).exp().clamp(max=LOSS.mismatch.max_importance_weight)
            away = ref[s] - logprobs
            kl = away.exp() - 1 - away
            token_loss = -surrogate * weight + LOSS.kl_coef * kl - LOSS.entropy_coef * entropy
            total = total + token_loss.sum()
        loss = total / sum(len(rollouts.completions[s]) for s in samples)
        optimizer.zero_grad()
        loss.backward()
        norms.append(
            float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm))
        )
        optimizer.step()
        losses.append(float(loss.detach()))
    weights = {
        part: tensor.clone()
        for name, parameter in model.named_parameters()
        for part, tensor in _as_written(name, parameter.detach())
    }
    return {"losses": losses, "grad_norms": norms, "weights": weights}


def _as_written(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A parameter under the names of a checkpoint, where each expert has tensors of its own."""
    module, _, kind = name.rpartition(".")
    if kind not in ("gate_up_proj", "down_proj"):
        yield name, tensor
        return
    for expert, part in enumerate(tensor):
        parts = part.chunk(2) if kind == "gate_up_proj" else (part,)
        kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        for own, matrix in zip(kinds, parts, strict=True):
            yield f"{module}.{expert}.{own}.weight", matrix
