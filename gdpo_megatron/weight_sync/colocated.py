"""Weight sync where trainer and engine live in the same ranks: a stream of tensors, no copy of all.

The policy yields its weights one tensor at a time under their Hugging Face names, gathered from
its own layout; the engine takes its part of each for its own. Every tensor that the model has must
arrive exactly once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from gdpo_megatron.conversion.mapping import hf_shapes
from gdpo_megatron.policy.model import MegatronModel
from gdpo_megatron.rollout.base import RolloutEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What a sync moved.

    Args:
        policy_version: the version that the engine has now.
        num_tensors: Hugging Face tensors.
        num_bytes: of these tensors, whole.
    """

    policy_version: int
    num_tensors: int
    num_bytes: int


def sync_weights(policy: MegatronModel, engine: RolloutEngine, policy_version: int) -> SyncReport:
    """Give the engine the policy's weights; collective over all ranks.

    Raises:
        RuntimeError: the stream is not exactly the model's tensors.
    """
    names: list[str] = []
    num_bytes = 0

    def counted() -> Iterator[tuple[str, Tensor]]:
        nonlocal num_bytes
        for name, tensor in policy.hf_tensors():
            names.append(name)
            num_bytes += tensor.numel() * tensor.element_size()
            yield name, tensor

    engine.load_weights(counted(), policy_version)
    expected = list(hf_shapes(policy.arch))
    if names != expected:
        raise RuntimeError(
            f"weight sync: {len(names)} tensors for {len(expected)}; "
            f"first difference: {sorted(set(names) ^ set(expected))[:3]}"
        )
    return SyncReport(policy_version=policy_version, num_tensors=len(names), num_bytes=num_bytes)
