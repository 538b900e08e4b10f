"""A rank that dies, and a job over two nodes.

The nodes are two launchers on this machine, started by scripts/run_node.sh as on a cluster. Not
covered: nodes on different machines, and a network between them. A launcher that is killed:
tests/unit/cli.
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
    script = ["bash", str(ROOT / "scripts/run_node.sh"), "train", str(path), "--seed", "7"]
    # The command of the environment that runs this test, wherever it was installed.
    environment = {
        "GDPO_VENV": str(Path(sys.prefix)),
        "NNODES": "2",
        "NPROC_PER_NODE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with (
        running(script, NODE_RANK="0", **environment) as first,
        running(script, NODE_RANK="1", **environment) as second,
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


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
