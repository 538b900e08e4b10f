"""What the check of a job's nodes says of facts that are written down by hand.

Not covered: GPUs, of which there are none where these tests run; real nodes and their network are
in tests/e2e/test_nodes_and_failures.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gdpo_megatron.config import yaml_text
from gdpo_megatron.config.loader import load_config
from gdpo_megatron.config.schema import RLConfig
from gdpo_megatron.nodes import health, network
from gdpo_megatron.nodes.health import Clock, NodeFacts
from gdpo_megatron.nodes.network import RankFacts, groups_of
from gdpo_megatron.platform.health import PROBES, Device

GIB = 2**30
NODE = NodeFacts(
    host="a",
    nproc=8,
    devices=8,
    versions={"torch": "2.13.0", "NCCL": "2.29.7"},
    config={"seed": "1", "parallel.tensor_model_parallel_size": "2"},
    run_dir="/data/run",
    disk_free=100 * GIB,
    disk_needed=40 * GIB,
)
ON_TIME = Clock(0.0, 0.001)


def problems(
    *nodes: NodeFacts, clocks: list[Clock] | None = None, shares: list[bool] | None = None
) -> list[tuple[int, str]]:
    return health.problems(
        [NodeFacts.load(it.dump()) for it in nodes],
        clocks or [ON_TIME] * len(nodes),
        shares or [True] * len(nodes),
    )


def test_nodes_that_are_alike_have_no_problem():
    nodes = [NODE, replace(NODE, host="b", disk_free=90 * GIB)]
    assert problems(*nodes) == []
    # Clocks that differ by what an exchange takes, and by what does not matter.
    assert problems(*nodes, clocks=[Clock(0, 0), Clock(-2.4, 0.5)]) == []
    line = health.summary(nodes, [Clock(0, 0), Clock(-0.25, 0.001)], 0.5)
    assert line.startswith("health check: 2 nodes of 8 ranks on 8 devices; versions and config (")
    assert "clocks within 250.0 ms, 90.0 GiB free; 0.5 s" in line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"devices": 7}, "8 ranks, but 7 devices; start at most as many"),
        (
            {"versions": {"torch": "2.12.0", "NCCL": "2.29.7"}},
            "torch is 2.12.0, elsewhere 2.13.0; install the same on all nodes",
        ),
        ({"versions": {"torch": "2.13.0"}}, "NCCL is none, elsewhere 2.29.7"),
        ({"nproc": 4}, "4 ranks, elsewhere 8; start the same number on all nodes"),
        (
            {"config": {"seed": "2", "parallel.tensor_model_parallel_size": "2"}},
            "seed is 2, elsewhere 1; start all nodes with the same file, options and variables",
        ),
        (
            {"disk_free": 39 * GIB},
            "run_dir /data/run: checkpoints and export take 40.0 GiB more, but 39.0 GiB are free",
        ),
    ],
    ids=lambda it: next(iter(it)) if isinstance(it, dict) else "",
)
def test_the_node_that_differs_is_named_with_what_differs(changes: dict[str, object], said: str):
    odd = replace(NODE, host="c", **changes)  # pyright: ignore[reportArgumentType]
    for place in range(3):
        nodes = [NODE, replace(NODE, host="b")]
        nodes.insert(place, odd)
        ((node, text),) = problems(*nodes)
        assert node == place
        assert text.startswith(f"node {place} (c): ") and said in text


def test_of_two_nodes_the_first_one_is_right():
    other = replace(NODE, host="b", versions=NODE.versions | {"torch": "2.12.0"})
    ((node, text),) = problems(NODE, other)
    assert node == 1 and "torch is 2.12.0, elsewhere 2.13.0" in text


def test_a_clock_that_is_off_is_named():
    found = problems(NODE, NODE, NODE, clocks=[ON_TIME, Clock(2.5, 0.1), Clock(-7.25, 0.1)])
    assert [node for node, _ in found] == [1, 2]
    assert "its clock is 2.5 s ahead of node 0's (at most 2)" in found[0][1]
    assert "its clock is 7.2 s behind node 0's" in found[1][1]


def test_a_run_folder_of_its_own_is_named():
    ((node, text),) = problems(NODE, replace(NODE, host="b"), shares=[True, False])
    assert node == 1
    assert "run_dir /data/run is not the folder that node 0 (a) sees as /data/run" in text


def test_all_that_is_wrong_is_said_at_once():
    worse = replace(NODE, host="b", devices=1, disk_free=0, versions={"torch": "1", "NCCL": "2"})
    assert len(problems(NODE, NODE, worse, shares=[True, True, False])) == 5


def test_facts_of_this_machine(tmp_path: Path, model_folder: Callable[[str], Path]):
    path = tmp_path / "config.yaml"
    data = {
        "run_dir": "run",
        "model": {"hf_path": str(model_folder("mha"))},
        "rewards": [{"name": "short", "type": "length", "args": {"limit": 8}}],
        "train": {"num_steps": 10},
        "checkpoint": {"save_interval": 5, "keep_last": 1, "export_hf": False},
    }
    path.write_text(yaml_text.dump(data))
    config = load_config(RLConfig, path)
    facts = health.gather("train", path, config, nproc=1, nnodes=2)
    assert facts.run_dir == str(tmp_path / "run") and facts.disk_free > 0
    assert facts.config["train.num_steps"] == "10" and facts.config["seed"] == "1234"
    assert {"Python", "torch", "megatron-core", "gdpo-megatron"} <= facts.versions.keys()
    # Of a parameter a rank has 4 bytes, 4 of its gradient and 8 of its moments; two checkpoints
    # have 4 + 12 each. Buffers are padded, by less than a hundredth here.
    parameters = network.state_bytes("eval", config, tmp_path, 1) / 4
    assert network.state_bytes("train", config, tmp_path, 1) == pytest.approx(
        16 * parameters, rel=0.01
    )
    assert facts.disk_needed == pytest.approx(2 * 16 * parameters, rel=0.01)
    changed = health.gather(
        "train", path, load_config(RLConfig, path, ["--seed", "2"]), nproc=1, nnodes=2
    )
    assert changed.config_hash != facts.config_hash
    assert health.gather("eval", path, config, nproc=1, nnodes=2).disk_needed == 0


# ---- what ranks see ------------------------------------------------------------------------------

RANK = RankFacts(
    node=0, host="a", device=Device("H", 80 * GIB, 78 * GIB), needed=70 * GIB, measured={}
)


def ranks_of(nodes: int, speeds: dict[str, float]) -> list[RankFacts]:
    """Two ranks a node, that have measured `speeds` where they are part of it."""
    return [
        replace(
            RANK,
            node=node,
            host=f"h{node}",
            measured={n: s for n, s in speeds.items() if n == "all" or str(node) in n.split()},
        )
        for node in range(nodes)
        for _ in range(2)
    ]


def test_groups_are_nodes_and_pairs_of_neighbours():
    rounds = list(groups_of([0, 0, 1, 1, 2, 2]))
    assert rounds == [
        [("0", [0, 1]), ("1", [2, 3]), ("2", [4, 5])],
        [("0 1", [0, 1, 2, 3])],
        [("1 2", [2, 3, 4, 5])],
    ]
    assert list(groups_of([0, 1])) == [[], [("0 1", [0, 1])], []]
    # Groups of a round share no rank: they are measured side by side.
    for groups in groups_of([n // 4 for n in range(64)]):
        members = [rank for _, ranks in groups for rank in ranks]
        assert len(members) == len(set(members))


def test_memory_that_does_not_suffice_is_named():
    full = replace(RANK, node=1, host="b", device=Device("H", 80 * GIB, 12 * GIB))
    (text,) = network.problems([RANK, full], 0.0)
    assert text.startswith("node 1 (b): rank 1 needs 70.0 GiB for its part of the model")
    assert "its device (H) has 12.0 GiB free of 80.0 GiB" in text


def test_a_slow_network_is_named():
    speeds = {"0": 200.0, "1": 150.0, "2": 0.5, "0 1": 40.0, "1 2": 45.0, "all": 38.0}
    ranks = ranks_of(3, speeds)
    (text,) = network.problems(ranks, 1.0)
    assert text.startswith("node 2 (h2): an all-reduce reaches 0.5 GB/s, less than 1 (launch.min_")
    assert network.problems(ranks, 0.0) == []
    # Each group is as fast as its slowest rank has seen it.
    ranks[0] = replace(ranks[0], measured=ranks[0].measured | {"0 1": 0.25})
    assert network.slowest(ranks)["0 1"] == 0.25
    assert len(network.problems(ranks, 1.0)) == 2


def test_a_node_that_is_slow_towards_all_neighbours_is_blamed():
    speeds = {"0 1": 0.1, "1 2": 0.2, "2 3": 40.0, "all": 0.1}
    found = network.problems(ranks_of(4, speeds), 1.0)
    assert len(found) == 2
    assert all("node 1 is slow towards each of its neighbours" in text for text in found)
    assert found[0].startswith("between node 0 (h0) and node 1 (h1): an all-reduce reaches 0.1 ")
    (text,) = network.problems(ranks_of(2, {"0 1": 0.1, "all": 0.1}), 1.0)
    assert "neighbours" not in text  # of two nodes nobody can say which


def test_what_is_reported():
    speeds = {"0": 200.0, "1": 150.0, "2": 160.0, "0 1": 40.0, "1 2": 45.0, "all": 38.0}
    lines = network.lines(ranks_of(3, speeds), PROBES["cuda"])
    assert lines == [
        "network: all-reduce of 128 MiB, slowest bus bandwidth in GB/s: within a node 150 (nodes 1)"
        ", between two nodes 40 (nodes 0, 1), over all 38",
        "memory: a rank's state takes 70.0 GiB; at least 78.0 GiB of 80.0 GiB are free for each",
    ]
