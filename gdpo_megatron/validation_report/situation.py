"""A job, the world that it is for, and what the checks have read of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gdpo_megatron.config.schema import RLConfig, SFTConfig
from gdpo_megatron.planning.job import Job
from gdpo_megatron.platform.gpus import Gpu
from gdpo_megatron.validate import Found


def counted(number: int, what: str) -> str:
    """A number of things in words.

    >>> counted(1, "batch"), counted(2, "batch"), counted(0, "row")
    ('1 batch', '2 batches', '0 rows')
    """
    end = "" if number == 1 else "es" if what.endswith("ch") else "s"
    return f"{number} {what}{end}"


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Where a job is to run.

    Args:
        size: ranks in all.
        gpus_per_node: ranks of a node, where there are several.
        gpu_name: of the table of GPUs; None is this machine.
        gpu: its row.
        port: of the first node, where nodes meet.
    """

    size: int
    gpus_per_node: int
    gpu_name: str | None = None
    gpu: Gpu | None = None
    port: int

    @property
    def num_nodes(self) -> int:
        """Nodes in all."""
        return -(-self.size // self.gpus_per_node)

    @property
    def ranks_of_node(self) -> int:
        """Ranks on each node."""
        return min(self.size, self.gpus_per_node)

    @property
    def elsewhere(self) -> bool:
        """Whether this machine is none of its nodes."""
        return self.gpu is not None

    def problems(self) -> list[str]:
        """Why there is no such world."""
        if self.size > self.gpus_per_node and self.size % self.gpus_per_node:
            return [
                f"--world-size {self.size} is no whole number of nodes with --gpus-per-node "
                f"{self.gpus_per_node}"
            ]
        return []


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What a section of the report looks at.

    Args:
        job: "train", "sft" or "eval".
        path: of the config.
        overrides: of its keys, as given.
        config: loaded, and without a problem.
        base_dir: folder that its relative paths start from.
        world: where it is to run.
        found: what the checks have read.
    """

    job: str
    path: Path
    overrides: Sequence[str]
    config: RLConfig | SFTConfig
    base_dir: Path
    world: World
    found: Found

    @property
    def planned(self) -> Job:
        """The same for the arithmetic of plans."""
        assert self.found.arch is not None
        return Job(config=self.config, arch=self.found.arch, world_size=self.world.size)


@dataclass(slots=True)
class Section:
    """A part of the report.

    Args:
        name: in the left column.
        lines: in the right one.
        problems: what is wrong; with any, the job cannot run.
    """

    name: str
    lines: list[str] = field(default_factory=list[str])
    problems: list[str] = field(default_factory=list[str])
