"""A job that is right, to be spoilt by the tests, and the command line to start it with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from support.cli_job import Cli, Job, Outcome

from gdpo_megatron import cli
from gdpo_megatron.config import yaml_text
from gdpo_megatron.launch import LaunchOptions


@pytest.fixture
def job(
    tmp_path: Path, model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Job:
    """A right job; no rank is ever started."""
    (tmp_path / "model").symlink_to(model_folder("mha"))
    config = {
        "run_dir": "run",
        "model": {"hf_path": "model", "max_sequence_length": 64},
        "data": {"train": "rows.jsonl"},
        "rewards": [
            {"name": "short", "type": "length", "args": {"limit": 8}},
            {"name": "right", "type": "gsm8k_correctness", "weight": 2.0},
        ],
        "rollout": {"num_prompts_per_step": 4, "group_size": 4, "max_completion_tokens": 32},
        "eval": {"max_completion_tokens": 32, "allow_train_overlap": True},
    }
    sft = {
        "run_dir": "sft_run",
        "model": {"hf_path": "model", "max_sequence_length": 64},
        "data": {"train": "pairs.jsonl"},
    }
    job = Job(tmp_path)
    for name, data in (("config.yaml", config), ("sft.yaml", sft)):
        (tmp_path / name).write_text(yaml_text.dump(data))
    job.write_rows([{"prompt": f"{n} + 1 =", "answer": f"#### {n + 1}"} for n in range(5)])
    job.write_rows(
        [{"prompt": f"{n} + 1 =", "completion": str(n + 1)} for n in range(5)], "pairs.jsonl"
    )

    def start(options: LaunchOptions, worker: Sequence[str], *, unit: str) -> int:
        job.started.append((options, list(worker), unit))
        return 0

    monkeypatch.setattr(cli, "run", start)
    monkeypatch.chdir(tmp_path)
    return job


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs the command line in this process."""

    def run(*arguments: str) -> Outcome:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        code = ended.value.code
        assert isinstance(code, int)
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return run
