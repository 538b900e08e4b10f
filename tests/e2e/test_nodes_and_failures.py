"""A rank that dies, and a job over two nodes.

The nodes are two launchers on this machine, with loopback addresses as hosts, started by
scripts/run_multinode.sh as a scheduler does. Not covered: nodes on different machines, a network
between them. A launcher that is killed: tests/unit/cli.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.jobs import cli, read_jsonl, running

from gdpo_megatron.config import yaml_text
from gdpo_megatron.config.loader import load_config
from gdpo_megatron.config.schema import RLConfig
from gdpo_megatron.validate import validate
from gdpo_megatron.validation_report.machine import checkpoint_bytes, export_bytes
from gdpo_megatron.validation_report.situation import Situation, World

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]


def write_config(folder: Path, quickstart: Path, **changes: Any) -> Path:
    config = {
        "run_dir": "run",
        "model": {
            "hf_path": str(quickstart / "model"),
            "init": "random",
            "max_sequence_length": 112,
        },
        "data": {"train": str(quickstart / "train.jsonl")},
        "rewards": [{"name": "letters", "type": "./reward.py:letters"}],
        "rollout": {"num_prompts_per_step": 4, "group_size": 4, "max_completion_tokens": 8},
        "logging": {"tensorboard": False},
    }
    (folder / "reward.py").write_text(
        "def letters(sample):\n    return sum(c.isalpha() for c in sample.completion) / 10\n"
    )
    path = folder / "config.yaml"
    path.write_text(yaml_text.dump(config | changes))
    return path


def test_a_rank_that_is_killed_ends_the_job(tmp_path: Path, quickstart: Path):
    path = write_config(tmp_path, quickstart, train={"num_steps": 100_000})
    with running(cli("train", path, "--nproc", "2")) as job:
        job.wait_for("s/step")
        processes = job.family()
        second = job.workers()[1]
        second.kill()
        ended = job.wait()
        assert ended.code not in (0, 2, 130)
        # torchrun names the rank that was the first to go.
        assert f"pid: {second.pid}" in ended.output and "SIGKILL" in ended.output
        _, alive = psutil.wait_procs(processes, timeout=30)
        assert not alive
    assert not (tmp_path / "run/checkpoints").exists()


def test_two_nodes_train_together(tmp_path: Path, quickstart: Path):
    path = write_config(
        tmp_path,
        quickstart,
        train={"num_steps": 1},
        parallel={"pipeline_model_parallel_size": 2},
    )
    predicted, export = predicted_bytes(path)
    script = ["bash", str(ROOT / "scripts/run_multinode.sh"), "train", str(path), "--seed", "7"]
    hosts = ("127.0.0.1", "127.0.0.2")
    (tmp_path / "hosts").write_text("".join(f"{host}\n" for host in hosts))
    # The command of the environment that runs this test, wherever it was installed.
    environment = {
        "GDPO_VENV": str(Path(sys.prefix)),
        "PBS_NODEFILE": str(tmp_path / "hosts"),
        "NPROC_PER_NODE": "1",
        "MASTER_PORT": str(free_port()),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with (
        running(script, HOSTNAME=hosts[0], **environment) as first,
        running(script, HOSTNAME=hosts[1], **environment) as second,
    ):
        ended = [first.wait(), second.wait()]
    assert [it.code for it in ended] == [0, 0], "\n".join(it.output for it in ended)
    # Rank 0, on the first node, speaks for all.
    assert "step 1/1" in ended[0].output and "step 1/1" not in ended[1].output
    run_dir = tmp_path / "run"
    (metrics,) = read_jsonl(run_dir / "metrics.jsonl")
    assert metrics["step"] == 1 and metrics["optimizer/grad_norm"] > 0
    ranks = sorted(it.name for it in (run_dir / "checkpoints/step_00000001").glob("rng_*"))
    assert ranks == ["rng_00000.json", "rng_00001.json"]
    assert (run_dir / "hf/model.safetensors").is_file()
    assert "seed: 7" in (run_dir / "config.yaml").read_text()
    # `validate` had said how much a checkpoint takes: its tensors to the byte, in files with heads.
    checkpoint = run_dir / "checkpoints/step_00000001"
    held = sum(it.stat().st_size for it in checkpoint.glob("*.distcp"))
    assert 0 <= held - predicted <= 0.1 * predicted
    assert 0 <= (run_dir / "hf/model.safetensors").stat().st_size - export <= 0.02 * export


def predicted_bytes(path: Path) -> tuple[int, int]:
    """Of a checkpoint and of the export, as `validate` tells them."""
    config = load_config(RLConfig, path)
    situation = Situation(
        job="train",
        path=path,
        overrides=(),
        config=config,
        base_dir=path.parent,
        world=World(size=2, gpus_per_node=1, port=0),
        found=validate("train", config, path.parent, 2),
    )
    return checkpoint_bytes(situation), export_bytes(situation)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
