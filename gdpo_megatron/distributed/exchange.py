"""Moving a step's rollouts from the engines that made them to the ranks that train on them.

The step's rollouts are numbered by sample id, 0 .. B-1, on all ranks alike. What every rank needs
(lengths, rewards) is gathered to all; tokens go only where they are trained on, in one exchange
whose sizes follow from the gathered lengths. Plain tensors throughout: nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gdpo_megatron.distributed.mesh import EngineMesh, Mesh


def gather_by_sample(
    sample_ids: Sequence[int], values: Tensor, num_samples: int, device: torch.device
) -> Tensor:
    """Bring per-sample values together on every rank.

    Args:
        sample_ids: the n samples that this rank contributes; each sample comes from one rank.
        values: [n, ...] of a dtype that can be summed; equal trailing shape on all ranks.
        num_samples: B.
        device: where the collective runs.

    Returns:
        [B, ...] on the CPU, row i holding sample i; 0 (False) where nobody contributed.
    """
    kind = torch.int64 if values.dtype == torch.bool else values.dtype
    table = torch.zeros((num_samples, *values.shape[1:]), dtype=kind)
    if len(sample_ids):
        table[torch.tensor(sample_ids)] = values.to("cpu", kind)
    # Every sample has one contributor, so the sum is that value, NaN and infinities included.
    table = table.to(device)
    dist.all_reduce(table)
    return table.cpu().to(values.dtype)


def gather_texts(text: str, device: torch.device) -> list[str]:
    """Bring a short text of each rank together on every rank; collective.

    Args:
        text: this rank's.
        device: where the collective runs.

    Returns:
        The texts by rank.
    """
    data = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
    size, world_size = torch.tensor([len(text.encode())]), dist.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size)]
    dist.all_gather(sizes, size.to(device))
    longest = max(1, *(int(it) for it in sizes))
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(data)] = data[:longest]
    texts = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in range(world_size)]
    dist.all_gather(texts, padded.to(device))
    return [bytes(row[: int(it)].tolist()).decode() for row, it in zip(texts, sizes, strict=True)]


ExchangedTokens = tuple[list[int], list[float], list[bool]]
"""Of a completion: token ids, log-probs, which of the tokens the model drew."""


def exchange_tokens(
    completions: Mapping[int, tuple[Sequence[int], Sequence[float], Sequence[bool]]],
    *,
    lengths: Sequence[int],
    replica_of: Sequence[int],
    dp_rank_of: Sequence[int],
    mesh: Mesh,
    engines: EngineMesh,
    device: torch.device,
) -> dict[int, ExchangedTokens]:
    """Send each completion from its engine's leader to all ranks that train on it.

    Args:
        completions: sample id -> (token ids, log-probs, loss mask), on the leader of the engine
            that made it.
        lengths: [B] completion lengths, equal on all ranks.
        replica_of: [B] engine replica that made each sample.
        dp_rank_of: [B] data-parallel rank that trains on it; -1 for none, it is not sent.
        mesh: the trainer's mesh.
        engines: the engines' mesh.
        device: where the collective runs.

    Returns:
        sample id -> the same, of the samples of this rank's data-parallel rank.
    """
    dp_of_rank = {r: d for d in range(mesh.dp_size) for r in mesh.trainer_ranks(d)}
    # Between two ranks samples travel in the order of their ids, so no header is needed.
    outgoing: list[list[int]] = [[] for _ in range(mesh.world_size)]
    incoming: list[list[int]] = [[] for _ in range(mesh.world_size)]
    for sample, (replica, dp_rank) in enumerate(zip(replica_of, dp_rank_of, strict=True)):
        if dp_rank < 0:
            continue
        if engines.leader(replica) == mesh.rank:
            for rank in mesh.trainer_ranks(dp_rank):
                outgoing[rank].append(sample)
        if dp_of_rank[mesh.rank] == dp_rank:
            incoming[engines.leader(replica)].append(sample)

    def swap(column: int, dtype: torch.dtype) -> list[Any]:
        sent = [value for ids in outgoing for i in ids for value in completions[i][column]]
        send_sizes = [sum(lengths[i] for i in ids) for ids in outgoing]
        receive_sizes = [sum(lengths[i] for i in ids) for ids in incoming]
        received = torch.empty(sum(receive_sizes), dtype=dtype, device=device)
        dist.all_to_all_single(
            received,
            torch.tensor(sent, dtype=dtype).to(device),
            output_split_sizes=receive_sizes,
            input_split_sizes=send_sizes,
        )
        return received.tolist()

    tokens, logprobs, masks = swap(0, torch.int64), swap(1, torch.float32), swap(2, torch.uint8)
    result: dict[int, ExchangedTokens] = {}
    position = 0
    for ids in incoming:
        for sample in ids:
            end = position + lengths[sample]
            part = slice(position, end)
            result[sample] = tokens[part], logprobs[part], list(map(bool, masks[part]))
            position = end
    return result
