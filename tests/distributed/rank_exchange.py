"""Rollouts carried from engines to the ranks that train on them, on this rank."""

from __future__ import annotations

from typing import Any

from rank_layouts import in_layout, platform  # prepares Megatron, so it comes first

import torch  # isort: skip

from gdpo_megatron.distributed.exchange import exchange_tokens, gather_by_sample
from gdpo_megatron.distributed.mesh import engine_mesh


def exchange(
    layouts: list[dict[str, int]], engine_sizes: list[int], steps: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Every step in every pair of trainer layout and engine size."""
    results = []
    for layout in layouts:
        with in_layout(**layout) as trainer:
            mesh = trainer["mesh"]
            for engine_tp in engine_sizes:
                engines = engine_mesh(mesh, engine_tp)
                for step in steps:
                    # What does not fit this pair is folded into it: fewer replicas, fewer ranks.
                    replica_of = [r % engines.num_replicas for r in step["replica_of"]]
                    dp_rank_of = [d if d < 0 else d % mesh.dp_size for d in step["dp_rank_of"]]
                    own = {
                        s: (tokens, logprobs, [token % 3 > 0 for token in tokens])
                        for s, (tokens, logprobs) in enumerate(step["completions"])
                        if engines.leader(replica_of[s]) == mesh.rank
                    }
                    received = exchange_tokens(
                        own,
                        lengths=[len(tokens) for tokens, _ in step["completions"]],
                        replica_of=replica_of,
                        dp_rank_of=dp_rank_of,
                        mesh=mesh,
                        engines=engines,
                        device=platform.device,
                    )
                    results.append(
                        {
                            "received": received,
                            "dp_rank": mesh.dp_rank,
                            "dp_rank_of": dp_rank_of,
                            "tp_rank": mesh.tp_rank,
                            "pp_rank": mesh.pp_rank,
                            "num_sent": len(own),
                            "num_replicas": engines.num_replicas,
                        }
                    )
    return results


def gather(ids_of_ranks: list[list[int]], values: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Each table, of which this rank knows the rows of its ids only."""
    with in_layout() as layout:
        ids = ids_of_ranks[layout["mesh"].rank]
        return {
            name: gather_by_sample(ids, table[ids], len(table), platform.device)
            for name, table in values.items()
        }


def everything(gathers: list[dict[str, Any]], exchanges: dict[str, Any]) -> dict[str, Any]:
    """Both, in one launch."""
    return {"gather": [gather(**case) for case in gathers], "exchange": exchange(**exchanges)}
