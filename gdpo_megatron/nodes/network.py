"""What ranks look at before they build a model: memory of their devices, the network between them.

Measured with the job's own process group and backend, over each node, over each pair of
neighbouring nodes (two rounds, in which the pairs do not share a node), and over all.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from gdpo_megatron.config.launch import LaunchConfig
from gdpo_megatron.config.paths import resolve_path
from gdpo_megatron.config.schema import RLConfig, SFTConfig
from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.model_folder import model_files
from gdpo_megatron.distributed.exchange import gather_texts
from gdpo_megatron.errors import InputError
from gdpo_megatron.planning.job import Job
from gdpo_megatron.planning.state import held_by
from gdpo_megatron.planning.tables import in_bytes
from gdpo_megatron.platform import Platform
from gdpo_megatron.platform.health import (
    NETWORK_HINT,
    PROBES,
    Device,
    Probe,
    bus_bandwidth,
    device_of_rank,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts:
    """What a rank has seen.

    Args:
        node: its node's number.
        host: that node's name.
        device: name, total and free bytes.
        needed: bytes that its part of the model and the optimizer take, without activations.
        measured: names of groups of ranks, and their bus bandwidth in 10^9 bytes a second.
    """

    node: int
    host: str
    device: Device
    needed: int
    measured: dict[str, float]


def check_ranks(platform: Platform, launch: LaunchConfig, needed: int) -> list[str]:
    """Look at this rank and at what connects it, and compare with the others; collective.

    Args:
        platform: after `join`.
        launch: with the bandwidth that is asked for.
        needed: bytes of this rank's state.

    Returns:
        Lines for a person.

    Raises:
        InputError: on all ranks, where one of them is not as it has to be.
    """
    probe = PROBES[platform.name]
    node = int(os.environ["GROUP_RANK"])
    device = device_of_rank(platform)
    nodes = [int(it) for it in gather_texts(str(node), platform.device)]
    own = RankFacts(
        node=node,
        host=socket.gethostname(),
        device=device,
        needed=needed,
        measured=_measure(platform, probe, nodes),
    )
    texts = gather_texts(json.dumps(asdict(own)), platform.device)
    ranks = [_load(text) for text in texts]
    minimum = launch.min_bandwidth_gb_per_s
    found = problems(ranks, probe.min_gb_per_s if minimum is None else minimum)
    if found:
        raise InputError(found)
    return lines(ranks, probe)


def state_bytes(job: str, config: RLConfig | SFTConfig, base_dir: Path, world_size: int) -> int:
    """What the rank with the largest part holds of the model, its gradients and its optimizer.

    Args:
        job: "train", "sft" or "eval", which has the model alone.
        config: of the job.
        base_dir: folder that its relative paths start from.
        world_size: ranks.
    """
    arch = load_architecture(model_files(resolve_path(base_dir, config.model.hf_path)))
    planned = Job(config=config, arch=arch, world_size=world_size)
    held = [held_by(planned, pp_rank) for pp_rank in range(planned.pp)]
    if job == "eval":
        return max(it.parameters for it in held)
    return max(it.parameters + it.gradients + it.optimizer for it in held)


def _load(text: str) -> RankFacts:
    data = json.loads(text)
    return RankFacts(**data | {"device": Device(**data["device"])})


def groups_of(nodes: Sequence[int]) -> Iterator[list[tuple[str, list[int]]]]:
    """Groups of ranks to measure, in rounds; groups of a round share no rank.

    Args:
        nodes: each rank's node.

    Yields:
        (name, ranks) of the groups of a round: a node's number, or the numbers of two of them.
    """
    of_node = {node: [r for r, it in enumerate(nodes) if it == node] for node in sorted({*nodes})}
    numbers = list(of_node)
    yield [(f"{node}", ranks) for node, ranks in of_node.items() if len(ranks) > 1]
    for first in (0, 1):
        pairs = zip(numbers[first::2], numbers[first + 1 :: 2], strict=False)
        yield [(f"{a} {b}", sorted(of_node[a] + of_node[b])) for a, b in pairs]


def _measure(platform: Platform, probe: Probe, nodes: Sequence[int]) -> dict[str, float]:
    measured: dict[str, float] = {}
    rank = dist.get_rank()
    for groups in groups_of(nodes):
        for name, ranks in groups:
            if rank not in ranks:
                continue
            if len(ranks) == len(nodes):
                measured[name] = bus_bandwidth(platform, None, probe)
                continue
            # Made by its own ranks alone: making it on all takes longer the more nodes there are.
            group = dist.new_group(ranks, use_local_synchronization=True)
            assert isinstance(group, dist.ProcessGroup)
            measured[name] = bus_bandwidth(platform, group, probe)
            dist.destroy_process_group(group)
    measured["all"] = bus_bandwidth(platform, None, probe)
    return measured


def slowest(ranks: Sequence[RankFacts]) -> dict[str, float]:
    """Bus bandwidth of each group, as its slowest rank has seen it."""
    found: dict[str, float] = {}
    for rank in ranks:
        for name, speed in rank.measured.items():
            found[name] = min(speed, found.get(name, speed))
    return found


def problems(ranks: Sequence[RankFacts], min_gb_per_s: float) -> list[str]:
    """What speaks against a job of these ranks.

    Args:
        ranks: facts by rank.
        min_gb_per_s: that each node and each pair of nodes must reach; 0 asks for nothing.
    """
    host = {it.node: it.host for it in ranks}
    found = [
        f"node {it.node} ({it.host}): rank {rank} needs {in_bytes(it.needed)} for its part of the "
        f"model and the optimizer alone, but its device ({it.device.name}) has "
        f"{in_bytes(it.device.free)} free of {in_bytes(it.device.total)}; end what else runs there "
        "(see gdpo-megatron doctor), or let each rank hold less (see gdpo-megatron plan)"
        for rank, it in enumerate(ranks)
        if it.device.free < it.needed
    ]
    slow = {n: s for n, s in slowest(ranks).items() if s < min_gb_per_s and n != "all"}
    pairs = [name.split() for name in slow if " " in name]
    measured_pairs = [name.split() for name in slowest(ranks) if " " in name]
    for name, speed in slow.items():
        nodes = name.split()
        named = " and ".join(f"node {it} ({host[int(it)]})" for it in nodes)
        where = f"between {named}" if len(nodes) > 1 else named
        # With three nodes or more, the one that is slow towards each neighbour is the one.
        common = [
            it
            for it in nodes
            if len(measured_pairs) > 1
            and sum(it in pair for pair in measured_pairs) > 1
            and all(pair in pairs for pair in measured_pairs if it in pair)
        ]
        blame = f"; node {common[0]} is slow towards each of its neighbours" if common else ""
        found.append(
            f"{where}: an all-reduce reaches {speed:.3g} GB/s, less than {min_gb_per_s:g} "
            f"(launch.min_bandwidth_gb_per_s){blame}; {NETWORK_HINT}"
        )
    return found


def lines(ranks: Sequence[RankFacts], probe: Probe) -> list[str]:
    """What is reported of ranks that are as they should be."""
    speeds = slowest(ranks)
    parts: list[str] = []
    for what, number in (("within a node", 1), ("between two nodes", 2)):
        some = {n: s for n, s in speeds.items() if n != "all" and len(n.split()) == number}
        if some:
            worst = min(some, key=lambda name: some[name])
            at = f" (nodes {worst.replace(' ', ', ')})" if len(some) > 1 else ""
            parts.append(f"{what} {some[worst]:.3g}{at}")
    parts.append(f"over all {speeds['all']:.3g}")
    least = min(ranks, key=lambda it: it.device.free)
    return [
        f"network: all-reduce of {in_bytes(probe.num_bytes)}, slowest bus bandwidth in GB/s: "
        f"{', '.join(parts)}",
        f"memory: a rank's state takes {in_bytes(max(it.needed for it in ranks))}; at least "
        f"{in_bytes(least.device.free)} of {in_bytes(least.device.total)} are free for each",
    ]
