"""A run proves its syncs as it says, and one whose canary fails is saved and stops; its memory.

What the proof sees is in tests/distributed/test_weight_sync.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support.jobs import read_jsonl, run_job

from gdpo_megatron.config import yaml_text
from gdpo_megatron.platform.memory import host_probe


@pytest.mark.distributed
def test_run(tmp_path: Path, quickstart: Path) -> None:
    model = {"hf_path": str(quickstart / "model"), "init": "random", "max_sequence_length": 160}
    config = {
        "run_dir": "run",
        "model": model,
        "data": {"train": str(quickstart / "train.jsonl")},
        "rewards": [{"name": "short", "type": "length", "args": {"limit": 8}}],
        "rollout": {"num_prompts_per_step": 2, "group_size": 4, "max_completion_tokens": 12},
        "weight_sync": {"checksum_interval": 3, "canary": {"interval": 4, "num_tokens": 5}},
        "train": {"num_steps": 5},
        "checkpoint": {"save_interval": 0, "export_hf": False},
        "logging": {"tensorboard": False},
    }
    (tmp_path / "config.yaml").write_text(yaml_text.dump(config))
    command = ("train", tmp_path / "config.yaml")
    done = run_job(*command)
    assert done.code == 0, done.output
    steps = read_jsonl(tmp_path / "run/metrics.jsonl")
    # Syncs are counted from 0; the first two are checked, then those at the interval.
    checked = [it["step"] for it in steps if "weight_sync/num_checksums" in it]
    assert checked == [1, 2, 4]
    assert [it["step"] for it in steps if "weight_sync/canary_num_tokens" in it] == [1, 2, 5]
    assert steps[0]["weight_sync/canary_num_tokens"] == 4 * 5
    assert steps[0]["weight_sync/num_checksums"] == steps[0]["weight_sync/num_resident"] > 20
    assert 0 <= steps[4]["weight_sync/canary_max_logprob_diff"] < 1e-5
    # Each phase's peak, where this kernel has them.
    phases = ["weight_sync", "rollout", "logprobs", "update"] if host_probe().forget else []
    for it in steps:
        peaks = [it[f"memory/{phase}/host_peak_bytes"] for phase in phases]
        assert all(2**26 < peak <= it["memory/host_peak_bytes"] for peak in peaks)

    stopped = run_job(
        *command, "--train.num_steps", "6", "--weight_sync.canary.max_logprob_diff", "1e-30"
    )
    assert stopped.code == 2, stopped.output
    assert "weight sync of version 5, canary (rank 0): the log-probs of 20 tok" in stopped.output
    assert "(weight_sync.canary.max_logprob_diff 1e-30)" in stopped.output
    assert "the run is saved after step 5; the same command goes on there" in stopped.output
    assert [it.name for it in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000005"]
