"""logprobs_and_entropy on ranks that each hold a slice of the vocabulary. Needs no Megatron."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from gdpo_megatron.policy.logprobs import logprobs_and_entropy


def vocab_parallel(cases: list[dict[str, Tensor | float | int]]) -> list[dict[str, Tensor]]:
    """Values and gradient of each case, from this rank's columns."""
    dist.init_process_group("gloo")
    rank, world_size, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    results = []
    for case in cases:
        logits = case["logits"].chunk(world_size, -1)[rank].clone().requires_grad_()
        logprobs, entropy = logprobs_and_entropy(
            logits,
            case["targets"],
            temperature=case["temperature"],
            vocab_size=case["vocab_size"],
            group=group,
        )
        (case["weights"][0] * logprobs + case["weights"][1] * entropy).sum().backward()
        results.append(
            {"logprobs": logprobs.detach(), "entropy": entropy.detach(), "grad": logits.grad}
        )
    return results
