"""The calculator example: a warm start, then GDPO over turns with a tool, on two ranks.

A few steps teach nothing: in CI, that conversations are what they should be. Under `full`, the
whole example, whose rewards rise.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from support.jobs import read_jsonl, running, succeed

from gdpo_megatron.environments.tools.calculator import calculate

pytestmark = pytest.mark.distributed

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/calculator"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's data, with a warm start that a few steps can learn: no bad examples."""
    spec = importlib.util.spec_from_file_location("calculator_make_data", EXAMPLE / "make_data.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.NUM_TRANSCRIPTS = 2048
    module.NO_CALL = module.BROKEN_CALL = 0.0
    folder = tmp_path_factory.mktemp("calculator")
    module.make_calculator_data(folder, seed=1)
    return folder


def test_turns_of_a_short_run(data: Path):
    sft, run = data / "sft", data / "gdpo"
    succeed(
        *("sft", EXAMPLE / "sft.yaml", "--nproc", "2", "--run_dir", sft),
        *("--model.hf_path", data / "model", "--data.train", data / "sft.jsonl"),
        *("--train.num_steps", "60", "--train.global_batch_size", "16"),
        *("--optimizer.warmup_steps", "5"),
    )
    succeed(
        *("train", EXAMPLE / "gdpo.yaml", "--nproc", "2", "--run_dir", run),
        *("--model.hf_path", sft / "hf", "--train.num_steps", "3"),
        *("--data.train", data / "train.jsonl", "--data.eval", data / "eval.jsonl"),
        *("--rollout.num_prompts_per_step", "4", "--rollout.temperature", "0.7"),
    )
    metrics = read_jsonl(run / "metrics.jsonl")
    assert [it["step"] for it in metrics] == [1, 2, 3]
    for it in metrics:
        assert it["environment/num_faults"] == 0 and it["environment/mean_turns"] > 1.2
        assert it["update/mismatch_abs_diff_max"] < 2e-4
        assert 0 < it["reward/used_tool/mean"] <= 1
    answered = 0
    for path in sorted((run / "rollouts").iterdir()):
        for rollout in read_jsonl(path):
            turns = rollout["turns"]
            assert 1 <= len(turns) <= 3
            assert rollout["num_tokens"] == sum(turn["num_tokens"] for turn in turns)
            assert "tool_response" not in rollout["completion"]
            used = max(turn["rewards"].get("used_tool", 0.0) for turn in turns)
            assert rollout["rewards"]["used_tool"] == used
            for turn in turns:
                expression = re.search(r'"expression": "([^"]*)"}}\n</tool_call>$', turn["text"])
                if turn["rewards"].get("used_tool") and turn["observation"] and expression:
                    result = calculate(json.loads(f'"{expression[1]}"'))
                    assert turn["observation"] == f"<tool_response>\n{result}\n</tool_response>"
                    answered += 1
    assert answered > 0


@pytest.mark.full
def test_the_example_learns(tmp_path: Path):
    """docs/environments.md has the course that it took."""
    command = [sys.executable, str(EXAMPLE / "calculator.py"), "--out", str(tmp_path), "--control"]
    with running(command) as job:
        job.process.wait(3600)
    assert job.process.returncode == 0, job.output[-4000:]
    found = {
        name: json.loads((tmp_path / name / "eval/hf/results.json").read_text())
        for name in ("sft", "gdpo", "shuffled")
    }
    correct = {
        name: next(iter(it["sets"].values()))["quantities"]["reward/correct"]["mean"]
        for name, it in found.items()
    }
    assert correct["gdpo"] > 0.7 and correct["gdpo"] > correct["sft"] + 0.3
    assert correct["shuffled"] < correct["sft"] + 0.15
    assert (tmp_path / "rewards.png").is_file()
