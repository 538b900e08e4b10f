"""A rank that dies, a launcher that is ended, and a job over two nodes.

The nodes are two launchers on this machine, with loopback addresses as hosts, started by
scripts/run_multinode.sh as a scheduler does; in a test of the whole (mark `full`) they are network
namespaces, whose cable is pulled. Not covered: nodes on different machines.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.jobs import SECONDS, cli, read_jsonl, running

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
        assert_gone(processes)
    assert ended.code == 1
    # The rank that was the first to go comes first; that the other one lost it, in a line after it.
    said = ended.output[ended.output.index("gdpo-megatron: the first to fail") :].splitlines()
    assert f"rank 1 on node 0 ({socket.gethostname()}, pid: {second.pid})" in said[0]
    assert said[0].endswith("SIGKILL")
    after = next(line for line in said[1:] if "after it" in line)
    assert "after it, rank 0 on node 0: " in after
    assert "Traceback" not in ended.output
    (log,) = (tmp_path / "run/logs").iterdir()
    assert f"({log}/node0/rank0.err)" in after
    # What was shown is in the files as well, and what was not: where rank 0 has noticed it.
    assert "s/step" in (log / "node0/rank0.out").read_text()
    assert "Traceback" in (log / "node0/rank0.err").read_text()
    assert not (tmp_path / "run/checkpoints").exists()


END: dict[str, tuple[signal.Signals, int]] = {
    "Ctrl-C": (signal.SIGINT, 130),
    "SIGTERM": (signal.SIGTERM, 130),
    "SIGKILL": (signal.SIGKILL, -signal.SIGKILL),
}
"""How a launcher is ended, and its exit code."""


@pytest.mark.full
@pytest.mark.parametrize("how", list(END))
def test_a_launcher_that_is_ended_takes_all_that_is_its_own_along(
    tmp_path: Path, quickstart: Path, how: str
):
    """Its torchrun, ranks and their reward workers; not a neighbour of the same name."""
    path = write_config(tmp_path, quickstart, train={"num_steps": 100_000})
    number, code = END[how]
    neighbour = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()", "gdpo_megatron.worker", str(path)],
        stdin=subprocess.PIPE,
    )
    try:
        with running(cli("train", path, "--nproc", "2")) as job:
            job.wait_for("s/step")
            processes, ranks = job.family(), job.workers()
            below = [it for rank in ranks for it in rank.children(recursive=True)]
            assert len(ranks) == 2 and len(below) >= 4  # two reward workers for each engine
            job.process.send_signal(number)
            ended = job.wait()
            assert_gone(processes)
        assert ended.code == code
        assert neighbour.poll() is None
    finally:
        neighbour.communicate()


def assert_gone(processes: list[psutil.Process]) -> None:
    """After a while: a rank that is told to end finishes its step, and saves."""
    _, alive = psutil.wait_procs(processes, timeout=SECONDS)
    assert not alive, alive


def start_of_nodes(path: Path, **environment: str) -> tuple[list[str], dict[str, str]]:
    """The command, and what is in the environment of each node."""
    script = ["bash", str(ROOT / "scripts/run_multinode.sh"), "train", str(path)]
    # The command of the environment that runs this test, wherever it was installed.
    return script, {
        "GDPO_VENV": str(Path(sys.prefix)),
        "NPROC_PER_NODE": "1",
        "MASTER_PORT": str(free_port()),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **environment,
    }


def test_two_nodes_train_together(tmp_path: Path, quickstart: Path):
    path = write_config(
        tmp_path,
        quickstart,
        train={"num_steps": 1},
        parallel={"pipeline_model_parallel_size": 2},
    )
    predicted, export = predicted_bytes(path)
    hosts = ("127.0.0.1", "127.0.0.2")
    (tmp_path / "hosts").write_text("".join(f"{host}\n" for host in hosts))
    script, env = start_of_nodes(path, PBS_NODEFILE=str(tmp_path / "hosts"))
    script += ["--seed", "7"]
    with (
        running(script, HOSTNAME=hosts[0], **env) as first,
        running(script, HOSTNAME=hosts[1], **env) as second,
    ):
        ended = [first.wait(), second.wait()]
    assert [it.code for it in ended] == [0, 0], "\n".join(it.output for it in ended)
    # Rank 0, on the first node, speaks for all.
    assert "step 1/1" in ended[0].output and "step 1/1" not in ended[1].output
    # The nodes were compared before, and the network measured.
    assert "health check: 2 nodes of 1 ranks; versions and config (" in ended[0].output
    assert "slowest bus bandwidth in GB/s: between two nodes " in ended[0].output
    assert "health check" not in ended[1].output
    run_dir = tmp_path / "run"
    (metrics,) = read_jsonl(run_dir / "metrics.jsonl")
    assert metrics["step"] == 1 and metrics["optimizer/grad_norm"] > 0
    ranks = sorted(it.name for it in (run_dir / "checkpoints/step_00000001").glob("rng_*"))
    assert ranks == ["rng_00000.json", "rng_00001.json"]
    assert (run_dir / "hf/model.safetensors").is_file()
    assert "seed: 7" in (run_dir / "config.yaml").read_text()
    (log,) = (run_dir / "logs").iterdir()
    files = sorted(str(it.relative_to(log)) for it in log.rglob("*.*"))
    assert files == ["node0/rank0.err", "node0/rank0.out", "node1/rank1.err", "node1/rank1.out"]
    # `validate` had said how much a checkpoint takes: its tensors to the byte, in files with heads.
    checkpoint = run_dir / "checkpoints/step_00000001"
    held = sum(it.stat().st_size for it in checkpoint.glob("*.distcp"))
    assert 0 <= held - predicted <= 0.1 * predicted
    assert 0 <= (run_dir / "hf/model.safetensors").stat().st_size - export <= 0.02 * export


def test_nodes_that_differ_and_networks_that_are_slow_start_no_model(
    tmp_path: Path, quickstart: Path
):
    """Nodes without numbers, which meet by c10d; once they differ, once the network does not do."""
    path = write_config(tmp_path, quickstart, train={"num_steps": 1})
    for first_more, second_more, said in (
        ([], ["--seed", "7"], "the config is another one"),
        (
            ["--launch.min_bandwidth_gb_per_s", "1e9"],
            ["--launch.min_bandwidth_gb_per_s", "1e9"],
            "GB/s, less than 1e+09 (launch.min_bandwidth_gb_per_s)",
        ),
    ):
        script, env = start_of_nodes(path, NNODES="2", MASTER_ADDR="127.0.0.1")
        with running([*script, *first_more], **env) as first:
            with running([*script, *second_more], **env) as second:
                ended = [first.wait(), second.wait()]
        assert [it.code for it in ended] == [2, 2], "\n".join(it.output for it in ended)
        # One of them is the first node, which says all of it.
        lines = [line for it in ended for line in it.output.splitlines() if said in line]
        assert lines and all(it.startswith("gdpo-megatron: ") for it in lines)
        assert not any("Traceback" in it.output for it in ended)
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.full
def test_ctrl_c_on_one_node_is_told_by_both(tmp_path: Path, quickstart: Path):
    """Without the check, and by c10d; the same command then goes on."""
    path = write_config(tmp_path, quickstart, train={"num_steps": 100_000})
    script, env = start_of_nodes(path, NNODES="2", MASTER_ADDR="127.0.0.1")
    script += ["--launch.health_check", "false"]
    with running(script, **env) as first, running(script, **env) as second:
        jobs = (first, second)
        first.wait_until(lambda: any("s/step" in it.output for it in jobs), "no step")
        processes = [it for job in jobs for it in job.family()]
        second.process.send_signal(signal.SIGINT)
        ended = [first.wait(), second.wait()]
        assert_gone(processes)
    assert [it.code for it in ended] == [130, 130]
    assert not any("health check" in it.output for it in ended)
    assert sum("interrupted and saved after step" in it.output for it in ended) == 1


@pytest.mark.full
def test_a_cable_that_is_pulled_ends_both_nodes_and_they_go_on(stories_folder: Path):
    """TP across two network namespaces: tools/two_nodes.py, which says what it has seen."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/two_nodes.py"), "--any"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode == 77:
        # Right: namespaces take root and a kernel that has them; the tool says what is missing.
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout[-4000:]
    assert "gone on from its checkpoint, and done" in done.stdout


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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
