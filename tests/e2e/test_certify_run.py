"""`gdpo-megatron certify` as a user starts it: real checks, their certificate, exit codes.

In CI one check that starts ranks, and one that cannot run here; all of them under --full. What
makes a check fail: tests/distributed/test_certify_checks.py, tests/unit/certify. Not covered: GPUs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support.assets import needed
from support.jobs import cli, run_job, running

from gdpo_megatron.certify.certificate import read_certificate
from gdpo_megatron.certify.checks import CHECKS

pytestmark = pytest.mark.distributed


def test_a_check_that_passes_and_one_that_cannot_run(tmp_path: Path) -> None:
    words = ("certify", "--processes", "1", "--only", "round_trip", "logits_te")
    ended = run_job(*words, "--output", str(tmp_path / "out"))
    assert ended.code == 0, ended.output
    assert "1 passed, 0 failed, 1 cannot run here" in ended.output
    certificate = read_certificate(tmp_path / "out/certificate.json")
    te, round_trip = certificate["checks"]
    assert (te["check"], te["status"]) == ("logits_te", "cannot run")
    assert te["reason"] == "needs a GPU and Transformer Engine"
    assert (round_trip["check"], round_trip["status"]) == ("round_trip", "pass")
    assert len(round_trip["measured"]) == 48 and all(it["good"] for it in round_trip["measured"])
    assert not {"commit", "modified", "version"} - certificate["project"].keys()


@pytest.mark.full
def test_all(tmp_path: Path) -> None:
    """On two processes, with the stories model in the place of a user's."""
    model = needed("models/stories260K")
    rows = tmp_path / "rows.jsonl"
    data = needed("data/gsm8k/train.jsonl")
    prepared = run_job("data", "prepare", "gsm8k", data, "--output", rows, "--limit", "200")
    assert prepared.code == 0, prepared.output
    words = ("--processes", "2", "--model", str(model), "--data", str(rows))
    with running(cli("certify", *words, "--output", str(tmp_path / "out"))) as job:
        code = job.process.wait(3 * 3600)  # each check has a limit of its own
    assert code == 0, job.output
    certificate = read_certificate(tmp_path / "out/certificate.json")
    status = {it["check"]: it["status"] for it in certificate["checks"]}
    assert list(status) == [it.name for it in CHECKS]
    assert {name for name, it in status.items() if it == "cannot run"} <= {
        *("logits_te", "weight_sync_vllm", "sleep_wake_vllm")
    }
