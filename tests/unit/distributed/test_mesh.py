"""Which global ranks belong together; that Megatron agrees is asserted at start-up and shown by
tests/distributed."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdpo_megatron.distributed.mesh import EngineMesh, Mesh, engine_mesh


def mesh(tp: int, pp: int, dp: int, rank: int = 0) -> Mesh:
    groups: Any = {field.name: None for field in fields(Mesh) if field.name.endswith("_group")}
    alone = {"cp_rank": 0, "cp_size": 1, "ep_rank": 0, "ep_size": 1, "etp_rank": 0, "etp_size": 1}
    return Mesh(
        rank=rank,
        world_size=tp * pp * dp,
        tp_rank=rank % tp,
        tp_size=tp,
        pp_rank=rank // (tp * dp),
        pp_size=pp,
        dp_rank=rank // tp % dp,
        dp_size=dp,
        **alone,
        **groups,
    )


def test_trainer_ranks_by_hand() -> None:
    """TP2 x PP2 x DP3: ranks 0-5 are the first stage, pairs of neighbours share layers."""
    assert [mesh(2, 2, 3).trainer_ranks(d) for d in range(3)] == [
        [0, 1, 6, 7],
        [2, 3, 8, 9],
        [4, 5, 10, 11],
    ]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_trainer_ranks_share_out_the_world(tp: int, pp: int, dp: int) -> None:
    world = range(tp * pp * dp)
    owners = [mesh(tp, pp, dp).trainer_ranks(d) for d in range(dp)]
    assert sorted(rank for ranks in owners for rank in ranks) == list(world)
    for rank in world:
        own = mesh(tp, pp, dp, rank)
        assert rank in own.trainer_ranks(own.dp_rank)
        assert own.is_last_stage == (rank >= len(world) - len(world) // pp)


@pytest.mark.parametrize("rank", range(4))
def test_engines_of_one_rank(rank: int) -> None:
    engines = engine_mesh(mesh(2, 2, 1, rank), 1)
    assert engines == EngineMesh(replica=rank, num_replicas=4, tp_rank=0, tp_size=1, tp_group=None)
    assert [engines.leader(replica) for replica in range(4)] == [0, 1, 2, 3]


def test_leaders_of_larger_engines() -> None:
    engines = EngineMesh(replica=1, num_replicas=3, tp_rank=1, tp_size=2, tp_group=None)
    assert [engines.leader(replica) for replica in range(3)] == [0, 2, 4]
