"""Whether the nodes of a job fit together: looked at before a rank is started, over the store.

Each launcher gathers what it sees of its node (`gather`), all exchange it, and each comes to the
same `problems`, from the facts alone. What only ranks can see (memory of devices, the network
between them) is looked at by them, before the model is built: network.py.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform as python_platform
import shutil
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import gdpo_megatron
from gdpo_megatron.config import yaml_text
from gdpo_megatron.config.loader import dump_config
from gdpo_megatron.config.paths import resolve_path
from gdpo_megatron.config.schema import RLConfig, SFTConfig
from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.model_folder import model_files
from gdpo_megatron.planning.tables import in_bytes
from gdpo_megatron.platform.health import num_devices, versions
from gdpo_megatron.platform.vllm_versions import installed_vllm
from gdpo_megatron.run_folder import leaves
from gdpo_megatron.validate import Found
from gdpo_megatron.validation_report.machine import (
    checkpoint_bytes,
    export_bytes,
    in_use,
    num_checkpoints,
)
from gdpo_megatron.validation_report.situation import Situation, World

MAX_CLOCK_SECONDS: Final = 2.0
"""Between the clocks of two nodes. Nothing that is computed depends on it; the order of what the
logs of several nodes say does, and what is signed or cached by time."""

_PACKAGES: Final = ("torch", "megatron-core", "transformers", "numpy", "safetensors")

_ABSENT: Final = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """What a launcher sees of its node.

    Args:
        host: its name.
        nproc: ranks that are to be started.
        devices: that it has; None where ranks share it.
        versions: by package.
        config: value of each key, as text, defaults included.
        run_dir: where it is here.
        disk_free: bytes, there.
        disk_needed: bytes of the checkpoints and the export, beside those that are there.
    """

    host: str
    nproc: int
    devices: int | None
    versions: dict[str, str]
    config: dict[str, str]
    run_dir: str
    disk_free: int
    disk_needed: int

    def dump(self) -> str:
        """As text."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> NodeFacts:
        """The inverse of `dump`."""
        return cls(**json.loads(text))

    @property
    def config_hash(self) -> str:
        """Of the resolved config."""
        return hashlib.sha256(json.dumps(self.config).encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Clock:
    """A node's clock.

    Args:
        ahead: seconds, of the first node's.
        error: by how much that may be wrong.
    """

    ahead: float
    error: float


# ---- looking -------------------------------------------------------------------------------------


def gather(
    job: str, path: Path, config: RLConfig | SFTConfig, *, nproc: int, nnodes: int
) -> NodeFacts:
    """Look at this node.

    Args:
        job: "train", "sft" or "eval".
        path: of the config.
        config: loaded.
        nproc: ranks of this node.
        nnodes: of the job.
    """
    base_dir = path.resolve().parent
    run_dir = resolve_path(base_dir, config.run_dir)
    data, _ = yaml_text.parse(dump_config(config))
    there = next(it for it in (run_dir, *run_dir.parents) if it.exists())
    return NodeFacts(
        host=socket.gethostname(),
        nproc=nproc,
        devices=num_devices(),
        versions=_versions(config),
        config={key: str(value) for key, value in leaves(data)},
        run_dir=str(run_dir),
        disk_free=shutil.disk_usage(there).free,
        disk_needed=_disk_needed(job, path, config, run_dir, nproc, nproc * nnodes),
    )


def _versions(config: RLConfig | SFTConfig) -> dict[str, str]:
    found = {"Python": python_platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = _ABSENT
    if isinstance(config, RLConfig) and config.rollout.engine == "vllm":
        found["vLLM"] = str(installed_vllm() or _ABSENT)
    return found | versions() | {"gdpo-megatron": f"{gdpo_megatron.__version__}, {_source()}"}


def _source() -> str:
    """Of this package's files: two checkouts with the same are alike, whatever git calls them."""
    digest = hashlib.sha256()
    root = Path(gdpo_megatron.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return f"source {digest.hexdigest()[:12]}"


def _disk_needed(
    job: str, path: Path, config: RLConfig | SFTConfig, run_dir: Path, nproc: int, ranks: int
) -> int:
    if job == "eval":
        return 0
    base_dir = path.resolve().parent
    arch = load_architecture(model_files(resolve_path(base_dir, config.model.hf_path)))
    situation = Situation(
        job=job,
        path=path,
        overrides=(),
        config=config,
        base_dir=base_dir,
        world=World(size=ranks, gpus_per_node=nproc, port=0),
        found=Found(arch=arch),
    )
    whole = checkpoint_bytes(situation) * num_checkpoints(situation) + export_bytes(situation)
    return max(0, whole - in_use(run_dir))


# ---- judging -------------------------------------------------------------------------------------


def problems(
    nodes: Sequence[NodeFacts], clocks: Sequence[Clock], shares_run_dir: Sequence[bool]
) -> list[tuple[int, str]]:
    """What speaks against a job on these nodes.

    What should be equal on all is compared with what most of them have, with the first one's where
    that is no answer.

    Args:
        nodes: facts by node.
        clocks: theirs.
        shares_run_dir: whether each sees what the first one has written there.

    Returns:
        (node, what differs there and what to do) of each.
    """
    found: list[tuple[int, str]] = []
    for node, it in enumerate(nodes):
        texts = [
            *_device_problems(it),
            *_versions_that_differ(nodes, node),
            *_keys_that_differ(nodes, node),
            *_disk_problems(it, nodes[0], shares=shares_run_dir[node]),
            *_clock_problems(clocks[node]),
        ]
        found += [(node, f"node {node} ({it.host}): {text}") for text in texts]
    return found


def _device_problems(it: NodeFacts) -> Iterator[str]:
    if it.devices is not None and it.devices < it.nproc:
        yield (
            f"{it.nproc} ranks, but {it.devices} devices; start at most as many (--nproc, "
            "NPROC_PER_NODE), or see `gdpo-megatron doctor` there for why they do not show"
        )


def _versions_that_differ(nodes: Sequence[NodeFacts], node: int) -> Iterator[str]:
    for package in {key: None for it in nodes for key in it.versions}:
        own, usual = _compared([it.versions.get(package, _ABSENT) for it in nodes], node)
        if own != usual:
            yield f"{package} is {own}, elsewhere {usual}; install the same on all nodes"


def _keys_that_differ(nodes: Sequence[NodeFacts], node: int) -> Iterator[str]:
    own_nproc, usual_nproc = _compared([str(it.nproc) for it in nodes], node)
    if own_nproc != usual_nproc:
        yield f"{own_nproc} ranks, elsewhere {usual_nproc}; start the same number on all nodes"
    own, usual = _compared([it.config_hash for it in nodes], node)
    if own == usual:
        return
    differing: list[str] = []
    for key in {key: None for it in nodes for key in it.config}:
        value, others = _compared([it.config.get(key, _ABSENT) for it in nodes], node)
        if value != others:
            differing.append(f"{key} is {value}, elsewhere {others}")
    yield (
        f"the config is another one ({own}, elsewhere {usual}): {'; '.join(differing[:5])}; start "
        "all nodes with the same file, options and variables"
    )


def _compared(values: Sequence[str], node: int) -> tuple[str, str]:
    """A node's value, and the one that most have; the first node's where several are as common."""
    return values[node], Counter(values).most_common(1)[0][0]


def _disk_problems(it: NodeFacts, first: NodeFacts, *, shares: bool) -> Iterator[str]:
    if not shares:
        yield (
            f"run_dir {it.run_dir} is not the folder that node 0 ({first.host}) sees as "
            f"{first.run_dir}: ranks write parts of one checkpoint; put it on a file system that "
            "all nodes share"
        )
    if it.disk_free < it.disk_needed:
        yield (
            f"run_dir {it.run_dir}: checkpoints and export take {in_bytes(it.disk_needed)} more, "
            f"but {in_bytes(it.disk_free)} are free; lower checkpoint.keep_last, or take another "
            "disk"
        )


def _clock_problems(clock: Clock) -> Iterator[str]:
    if abs(clock.ahead) - clock.error > MAX_CLOCK_SECONDS:
        where = "ahead of" if clock.ahead > 0 else "behind"
        yield (
            f"its clock is {abs(clock.ahead):.1f} s {where} node 0's (at most {MAX_CLOCK_SECONDS:g}"
            "); let a time service (chrony, systemd-timesyncd) set it"
        )


def summary(nodes: Sequence[NodeFacts], clocks: Sequence[Clock], seconds: float) -> str:
    """One line for nodes that fit together."""
    ahead = [it.ahead for it in clocks]
    have = "" if nodes[0].devices is None else f" on {nodes[0].devices} devices"
    return (
        f"health check: {len(nodes)} nodes of {nodes[0].nproc} ranks{have}; versions and config "
        f"({nodes[0].config_hash}) equal, clocks within {(max(ahead) - min(ahead)) * 1e3:.1f} ms, "
        f"{in_bytes(min(it.disk_free for it in nodes))} free; {seconds:.1f} s"
    )
