"""The reference in the policy's place: its weights are exchanged with the policy's while it speaks.

Of the reference a rank keeps what it also keeps of the optimizer's state: the part of Megatron's
parameter buffers that it updates, 1 / (DP x CP) of its parameters, in host memory. Before the
reference is asked, that part and the policy's change places, and Megatron's own gather of
parameters brings the parts of the others; afterwards the same again. The parameters stay views of
their buffers, and what is exchanged are their bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from gdpo_megatron.data.batching import MicroBatch

if TYPE_CHECKING:  # which imports this module
    from gdpo_megatron.policy.megatron_policy import MegatronPolicy

PIECE_NUMEL = 2**22
"""Elements that are exchanged at a time: what the exchange needs of memory."""


class SwappedReference:
    """The policy as it is now, to be asked later.

    Args:
        policy: with all of its weights trained, so that they all are in Megatron's buffers.
    """

    def __init__(self, policy: MegatronPolicy):
        assert policy.lora is None, "the policy without its adapters is the reference"
        self._policy = policy
        self._parts = [part.to("cpu", copy=True) for part in own_parts(policy.ddp)]

    @property
    def num_bytes(self) -> int:
        """Host memory of this rank's part."""
        return sum(part.nbytes for part in self._parts)

    def logprobs(
        self, micro_batches: Sequence[MicroBatch], temperature: float
    ) -> list[Tensor | None]:
        """As MegatronModel's; collective over the mesh."""
        self._exchange()
        results = self._policy.logprobs(micro_batches, temperature)
        self._exchange()
        return results

    @torch.no_grad()
    def _exchange(self) -> None:
        for ddp in self._policy.ddp:
            if ddp.ddp_config.overlap_param_gather:
                ddp.start_param_sync(force_sync=True)  # what is on its way has arrived
        for kept, used in zip(self._parts, own_parts(self._policy.ddp), strict=True):
            for a, b in zip(kept.split(PIECE_NUMEL), used.split(PIECE_NUMEL), strict=True):
                before = b.to(a.device, copy=True)
                b.copy_(a)
                a.copy_(before)
        self._gather()

    def _gather(self) -> None:
        """Bring the parts of the other ranks."""
        for ddp in self._policy.ddp:
            ddp.start_param_sync(force_sync=True)


def own_parts(chunks: Sequence[DistributedDataParallel]) -> Iterator[Tensor]:
    """What this rank updates of each bucket of parameters, as views."""
    for ddp in chunks:
        groups: list[Any] = [*ddp.bucket_groups, *ddp.expert_parallel_bucket_groups]
        for group in groups:
            size = group.intra_distributed_optimizer_instance_size
            rank = group.intra_distributed_optimizer_instance_rank
            for bucket in group.buckets:
                yield bucket.param_data.chunk(size)[rank]
