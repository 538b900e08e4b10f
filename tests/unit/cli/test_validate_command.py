"""`gdpo-megatron validate`: what it tells of a job, what it refuses, and that it leaves no trace.

Lines are compared as a whole where they are numbers that can be written down by hand. Not covered:
what validation itself refuses (test_bad_input.py); that the commands it prints start the job, which
is what the end-to-end tests of launching show; GPUs.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from support.cli_job import Cli, Job, Outcome

from gdpo_megatron.validation_report import machine


@pytest.fixture(autouse=True)
def no_trace(job: Job) -> Iterator[None]:
    """Whatever is asked: no file is written, no rank started."""
    yield
    left = {name for name in job.files() if "__pycache__" not in name}
    known = {"config.yaml", "sft.yaml", "rows.jsonl", "pairs.jsonl", "judge.py", "eval.jsonl"}
    assert {name for name in left if name.split("/")[0] != "model"} <= known
    assert not job.started


def part(outcome: Outcome, name: str) -> list[str]:
    """The lines of a section of the report."""
    found: list[str] = []
    inside = False
    for line in outcome.out.split("\n\n")[0].splitlines():
        if line[:12].strip():
            inside = line[:12].strip() == name
        if inside:
            found.append(line[12:])
    return found


def problems(outcome: Outcome) -> list[str]:
    assert outcome.code == 2, outcome
    return [line.removeprefix("gdpo-megatron: ") for line in outcome.err.splitlines()]


def test_what_a_training_run_resolves_to(job: Job, run_cli: Cli):
    job.write_rows([{"prompt": f"{n} + 1 =", "answer": str(n + 1)} for n in range(5)])
    outcome = run_cli("validate", "config.yaml", "--world-size", "2", "--train.num_steps", "10")
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert part(outcome, "job") == ["train of config.yaml"]
    # Five prompts of the same length; 32 of 64 tokens are the completion's; 10 x 4 / 5 = 8.
    lines = part(outcome, "data")
    assert lines[0] == f"data.train: {job.folder / 'rows.jsonl'}"
    assert lines[1].startswith("  prompts: 5, of ") and lines[1].endswith("32 fit; 0 are left out")
    assert lines[2] == "  10 steps of 4 go over them 8 times"
    # `length` is 1 up to 8 tokens; an answer is right, nothing is not.
    lines = part(outcome, "rewards")
    assert lines[0].startswith("data.train: 5 rows, with its answer")
    assert lines[2] == "  right: answers 1, empty 0"
    assert lines[1].startswith("  short: answers ") and lines[1].endswith("empty 1")
    assert part(outcome, "layout") == ["2 ranks on 1 node, DP2"]
    assert part(outcome, "engines")[1:] == ["2 prompts x 4 = 8 completions of a step for each"]
    assert part(outcome, "batches") == [
        "4 prompts x 4 = 16 completions of a step, in 1 minibatch (optimizer steps) of 16",
        "2 data-parallel ranks: 8 completions each, in 2 micro-batches of up to 4",
        "the longest: 4 x 63 positions in a micro-batch, padding included",
    ]
    assert part(outcome, "rendezvous") == ["one node: a free port is taken when it starts"]
    commands = outcome.out.split("\n\n")[1:]
    overrides = "--train.num_steps 10"
    assert commands[0].endswith(f"  gdpo-megatron train config.yaml {overrides} --nproc 2")
    assert "-m gdpo_megatron.agent --nproc-per-node=2 --nnodes=1 --standalone" in commands[1]
    assert commands[1].endswith(f"-m gdpo_megatron.worker train config.yaml {overrides}")
    assert commands[2].rstrip().endswith(f"scripts/slurm.sbatch train config.yaml {overrides}")


def test_a_world_of_gpus_elsewhere(job: Job, run_cli: Cli):
    """vLLM is not here, and is no problem of theirs; nodes are whole, and their groups told."""
    arguments = ["config.yaml", "--rollout.engine", "vllm", "--precision.params_dtype", "bfloat16"]
    wide = ["--parallel.tensor_model_parallel_size", "2", "--world-size", "6"]
    nodes = ["--gpus-per-node", "3", "--rdzv-port", "4321"]
    outcome = run_cli("validate", *arguments, *wide, *nodes, "--gpu", "h100-80")
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert part(outcome, "layout") == [
        "6 ranks on 2 nodes, TP2 x DP3",
        "note: tensor parallel groups of 2 cross nodes, which is slow",
    ]
    assert part(outcome, "engines")[-1] == "note: 2 of them have nothing to do"
    assert part(outcome, "precision")[:2] == [
        "bfloat16 parameters, float32 gradients and optimizer",
        "6 x h100-80: 80 GB, compute capability 9.0; never executed by this project",
    ]
    assert "--nproc 3 --nnodes 2 --rdzv-endpoint NODE0:4321" in outcome.out
    assert "sbatch --nodes=2 --gpus-per-node=3 " in outcome.out
    old = run_cli("validate", *arguments, "--gpu", "v100-32")
    assert problems(old) == [
        "precision.params_dtype bfloat16 needs a GPU of compute capability 8.0 or higher; this one "
        "has 7.0"
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("nowhere.yaml", "no config file nowhere.yaml"),
        ("config.yaml --gpu h100", "--gpu: no 'h100'; did you mean 'h100-80'?"),
        (
            "config.yaml --world-size 12",
            "--world-size 12 is no whole number of nodes with --gpus-per-node 8",
        ),
        ("config.yaml --optimizer.lrr 1", "optimizer.lrr: unknown key; did you mean 'lr'?"),
        ("sft.yaml --trian.num_steps 1", "trian: unknown key; did you mean 'train'?"),
        (
            "config.yaml --world-size 3 --parallel.tensor_model_parallel_size 2",
            "3 ranks (--nproc x --nnodes) do not fit parallel.tensor_model_parallel_size 2 x "
            "pipeline_model_parallel_size 1: start a multiple of 2",
        ),
    ],
)
def test_what_is_refused(job: Job, run_cli: Cli, words: str, expected: str):
    outcome = run_cli("validate", *words.split())
    assert problems(outcome) == [expected] and outcome.out == ""


def test_a_config_of_sft(job: Job, run_cli: Cli):
    outcome = run_cli("validate", "sft.yaml")
    assert outcome.code == 0, outcome
    assert part(outcome, "job") == ["sft of sft.yaml"] and not part(outcome, "rewards")
    assert part(outcome, "data")[1].startswith("  rows: 5, of ")
    assert part(outcome, "batches")[0] == "64 rows of a step"


def test_a_config_of_eval_is_asked_for(job: Job, run_cli: Cli):
    job.write_rows([{"prompt": f"{n} + 2 =", "answer": str(n + 2)} for n in range(3)], "eval.jsonl")
    job.edit({"data.train": None, "data.eval": "eval.jsonl"})
    assert problems(run_cli("validate", "config.yaml")) == [
        "data.train: missing; train needs a file of rows",
        "it has evaluation sets: --job eval looks at it as a config of `eval`",
    ]
    outcome = run_cli("validate", "config.yaml", "--job", "eval")
    assert outcome.code == 0, outcome
    assert part(outcome, "data")[1].endswith("32 fit; 0 are left out; 1 completions of each")
    assert part(outcome, "rewards")[2] == "  right: answers 1, empty 0"
    assert not part(outcome, "batches") and len(part(outcome, "disk")) == 1


def test_a_reward_that_cannot_be_called_is_found(job: Job, run_cli: Cli):
    (job.folder / "judge.py").write_text(
        "def broken(sample):\n    return sample.metadata['label']\n"
        "def strict(sample):\n    return len(sample.completion) or None\n"
    )
    rewards = [{"name": it, "type": f"./judge.py:{it}"} for it in ("broken", "strict")]
    job.edit({"rewards": rewards})
    outcome = run_cli("validate", "config.yaml")
    (problem,) = problems(outcome)
    assert problem.startswith("rewards.broken: no sample of data.train has a score: 10 invalid: ")
    assert "KeyError" in problem
    strict = part(outcome, "rewards")[2]
    assert strict.startswith("  strict: answers 6, 5 invalid: returned NoneType"), strict
    assert "start it" not in outcome.out


def test_port_and_disk(job: Job, run_cli: Cli, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        nodes = ("--world-size", "2", "--gpus-per-node", "1", "--rdzv-port", str(port))
        (problem,) = problems(run_cli("validate", "sft.yaml", *nodes))
    assert problem.startswith(f"--rdzv-port {port}: cannot be listened on here: ")
    assert machine.port_problem(70000) == "no port number"
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    (problem,) = problems(run_cli("validate", "sft.yaml"))
    assert problem.startswith("run_dir: checkpoints and export take ")
    assert problem.endswith("1000 B free; lower checkpoint.keep_last, or take another disk")
    assert run_cli("validate", "sft.yaml", "--gpu", "a100-80").code == 0


@pytest.mark.parametrize(
    ("steps", "interval", "keep", "expected"),
    [(100, 0, 2, 1), (100, 50, 2, 2), (100, 10, 2, 3), (100, 10, 5, 6), (5, 50, 2, 1)],
)
def test_number_of_checkpoints(steps: int, interval: int, keep: int, expected: int):
    """A new one is whole before an old one goes: keep_last + 1, where so many are saved."""
    checkpoint = SimpleNamespace(save_interval=interval, keep_last=keep)
    config = SimpleNamespace(checkpoint=checkpoint, train=SimpleNamespace(num_steps=steps))
    assert machine.num_checkpoints(SimpleNamespace(config=config)) == expected  # pyright: ignore
