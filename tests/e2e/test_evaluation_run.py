"""`gdpo-megatron eval` with a real engine: Ctrl-C, going on, a config of an evaluation alone.

What a kill leaves at any byte, and every figure: tests/unit/evaluation.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from support.evaluations import evaluate
from support.jobs import cli, run_job, running

from gdpo_megatron.certify.family_models import save_model
from gdpo_megatron.config import yaml_text

NUM_PROMPTS, N = 6, 2
CHUNK = 2

REWARD_FILE = f"""
import time
from pathlib import Path

CALLS = [0]  # of this worker, the only one

def letters(sample):
    CALLS[0] += 1
    go = Path(__file__).with_name("go")
    while CALLS[0] > {CHUNK * N} and not go.exists():
        time.sleep(0.02)
    return sum(c.isalpha() for c in sample.completion) / 10
"""


@pytest.mark.distributed
def test_an_interrupted_evaluation_goes_on_to_the_same_bytes(tmp_path: Path):
    save_model(tmp_path / "model", "llama")
    (tmp_path / "reward.py").write_text(REWARD_FILE)
    rows = [{"prompt": f"{n} cats"} for n in range(NUM_PROMPTS)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(it)}\n" for it in rows))
    config = {
        "run_dir": "run",
        "model": {"hf_path": "model", "max_sequence_length": 64},
        "rewards": [{"name": "letters", "type": "./reward.py:letters"}],
        "reward_suite": {"num_workers": 1, "sample_timeout_seconds": 300},
        "eval": {
            "max_completion_tokens": 16,
            "samples_per_prompt": N,
            "num_completions_per_chunk": CHUNK * N,
            "correct": {"reward": "letters", "gte": 0.5, "pass_at_k": [1, N]},
            "sets": [{"name": "cats", "data": "rows.jsonl", "answer_key": None}],
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml_text.dump(config))
    folder = tmp_path / "run/eval/model"
    with running(cli("eval", path)) as job:
        job.wait_for("chunk 1/3")
        job.process.send_signal(signal.SIGINT)
        job.wait_for("finishing the chunk and saving")
        for rank in job.workers():  # the launcher does so too, a little later
            rank.send_signal(signal.SIGTERM)
        (tmp_path / "go").touch()
        stopped = job.wait()
    assert stopped.code == 130, stopped.output
    assert "interrupted; the same command goes on" in stopped.output
    assert not (folder / "results.json").exists()
    done = (folder / "cats.jsonl").read_bytes()
    assert done.count(b"\n") == 2 * CHUNK * N

    resumed = run_job("eval", path)
    assert resumed.code == 0, resumed.output
    assert "cats: 6 prompts x 2, T 1, top_p 1, at most 16 tokens" in resumed.output
    assert (folder / "cats.jsonl").read_bytes().startswith(done)
    # In one piece, in this process; without waiting, for the file is there.
    assert evaluate(path, "--run_dir", "whole")
    for name in ("results.json", "cats.jsonl", "cats.progress.jsonl"):
        assert (folder / name).read_bytes() == (tmp_path / "whole/eval/model" / name).read_bytes()
