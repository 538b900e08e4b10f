"""The table of examples/clusters/README.md: layouts, memory and step times, as planned.

Nothing in it is measured. Models are folders with a config.json, no weights are read.

    GDPO_MODELS=/models python tools/cluster_table.py [--print]
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gdpo_megatron.config.schema import RLConfig
from gdpo_megatron.planning.job import load_job
from gdpo_megatron.planning.machine import GPUS, Assumptions
from gdpo_megatron.planning.plan import Plan, make_plan
from gdpo_megatron.planning.tables import layout_name

FOLDER = Path(__file__).parents[1] / "examples" / "clusters"
DOCUMENT = FOLDER / "README.md"
GPU = "h100-80"
MARKS = re.compile(r"(<!-- planned -->\n).*?(\n<!-- end -->)", re.S)


@dataclass(frozen=True, slots=True)
class Cluster:
    """A config for so many nodes of so many GPUs, which its name ends with: MODEL_2x8.yaml."""

    path: Path
    num_nodes: int
    gpus_per_node: int

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.num_nodes * self.gpus_per_node

    def plan(self) -> Plan:
        """Of its job; InputError where it does not fit its world."""
        job = load_job(self.path, [], world_size=self.world_size)
        return make_plan(job, GPUS[GPU], self.gpus_per_node, Assumptions())

    @property
    def command(self) -> str:
        """What starts it, on each node."""
        path = self.path.relative_to(FOLDER.parents[1])
        command = f"gdpo-megatron train {path} --nproc {self.gpus_per_node}"
        if self.num_nodes == 1:
            return command
        return f"{command} --nnodes {self.num_nodes} --rdzv-endpoint NODE0:29500"


def clusters() -> list[Cluster]:
    """All of them, by name and nodes."""
    found: list[Cluster] = []
    for path in FOLDER.glob("*.yaml"):
        nodes, gpus = path.stem.rsplit("_", 1)[1].split("x")
        found.append(Cluster(path, int(nodes), int(gpus)))
    return sorted(found, key=lambda it: (it.path.stem.rsplit("_", 1)[0], it.num_nodes))


def table_lines() -> Iterator[str]:
    """As Markdown, and the commands."""
    yield (
        "| config | nodes | layout | engine | GiB of a GPU: sync | rollout | log-probs, reference "
        "| update | of | step s | bubble |"
    )
    yield "|---|---:|---|---|---:|---:|---:|---:|---:|---:|---:|"
    for cluster in clusters():
        plan = cluster.plan()
        config, phases = plan.job.config, plan.memory.phases
        assert isinstance(config, RLConfig)
        rollout = config.rollout
        gib = {name: sum(parts.values()) / 2**30 for name, parts in phases.items()}
        passes = max(gib.get("logprobs", 0.0), gib.get("reference", 0.0))
        cells = [
            f"`{cluster.path.stem}`",
            str(cluster.num_nodes),
            layout_name(plan.job),
            f"{rollout.engine} TP{rollout.tensor_parallel_size}",
            *(f"{it:.1f}" for it in (gib["weight_sync"], gib["rollout"], passes, gib["update"])),
            f"{plan.limit_bytes / 2**30:.1f}",
            f"{plan.time.seconds:.0f}",
            f"{plan.time.bubble:.0%}",
        ]
        yield f"| {' | '.join(cells)} |"
    yield from ("", "Started on each node (NODE0 is the first one's name):", "", "```bash")
    yield from (cluster.command for cluster in clusters())
    yield "```"


def main() -> None:
    """Write the table where the document has the last one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--print", action="store_true", help="leave the document as it is")
    found = "\n".join(table_lines())
    print(found)
    if not parser.parse_args().print:
        text = DOCUMENT.read_text()
        assert MARKS.search(text), f"{DOCUMENT} has no place for the table"
        DOCUMENT.write_text(MARKS.sub(lambda m: m[1] + found + m[2], text))


if __name__ == "__main__":
    main()
