"""`gdpo-megatron certify` around its checks: how each can end, what it says, what it leaves.

The checks here are made up, and start nothing but a plain interpreter. The real ones are in
tests/distributed/test_certify_checks.py and, through the command line, in tests/e2e.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from gdpo_megatron import cli as command_line
from gdpo_megatron.certify import checks as table
from gdpo_megatron.certify.certificate import read_certificate
from gdpo_megatron.certify.check import Check, CheckFailed, Findings, Measured
from gdpo_megatron.certify.job import Job
from gdpo_megatron.errors import InputError


def good(job: Job) -> Findings:
    measured = [Measured("a", 0.5, "<=", 1.0), Measured("b", 2.0, "<=", 3.0)]
    return Findings(measured=measured, notes=["of a"])


def beyond(job: Job) -> Findings:
    return Findings(measured=[Measured("a", 2.0, "<=", 1.0), Measured("fine", 1.0, "==", 1.0)])


def no_number(job: Job) -> Findings:
    return Findings(measured=[Measured("a", float("nan"), "<=", 1.0)])


def nothing(job: Job) -> Findings:
    return Findings(measured=[])


def raises(job: Job) -> Findings:
    raise ZeroDivisionError("no")


def refuses(job: Job) -> Findings:
    raise CheckFailed("a rank said so")


_HANG = """
import pathlib, subprocess, sys, time
child = subprocess.Popen(
    [sys.executable, "-c", "import time\\nwhile True: time.sleep(1)"], start_new_session=True
)
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
while True: time.sleep(1)
"""


def hangs(job: Job) -> Findings:
    """What it starts never ends, and has a child in a session of its own."""
    pid = job.folder / "pid"
    with job.started([sys.executable, "-c", _HANG, str(pid)]) as running:
        while not (pid.is_file() and pid.read_text()):
            pass
        running._left = lambda: 0.0  # its time is up
        running.wait()
    raise AssertionError("not reached")


def ends_early(job: Job) -> Findings:
    with job.started([sys.executable, "-c", "raise SystemExit(3)"]) as running:
        running.wait_until(lambda: False, "it was done")
    raise AssertionError("not reached")


REASONS: dict[str, tuple[Callable[[Job], Findings], str | None]] = {
    "good": (good, None),
    "beyond": (beyond, "not so: a 2 <= 1"),
    "no_number": (no_number, "not so: a nan <= 1"),
    "nothing": (nothing, "nothing was measured"),
    "raises": (raises, "the check broke: ZeroDivisionError('no')"),
    "refuses": (refuses, "a rank said so"),
    "hangs": (hangs, "not done after 900 s; see log.txt"),
    "ends_early": (ends_early, "ended (exit code 3) before it was done"),
}


@pytest.fixture
def certify(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str]]:
    made_up = [Check(name=name, proves=f"{name}.", run=run) for name, (run, _) in REASONS.items()]
    absent = Check(name="absent", proves="it.", run=raises, missing=lambda _: "needs a moon")
    monkeypatch.setattr(table, "CHECKS", (*made_up, absent))
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            command_line.main(["certify", *words])
        said = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, said.out + said.err

    return run


def test_no_check_stops_the_others(certify: Any, tmp_path: Path) -> None:
    code, said = certify("--processes", "2", "--output", "out", "--json", "too.json")
    assert code == 1, said
    assert "1 passed, 7 failed, 1 cannot run here" in said
    certificate = read_certificate(tmp_path / "out/certificate.json")
    assert certificate == read_certificate(tmp_path / "too.json")
    found = {it["check"]: it for it in certificate["checks"]}
    assert list(found) == [*REASONS, "absent"]
    for name, (_, reason) in REASONS.items():
        assert (found[name]["status"], found[name]["reason"]) == (
            "fail" if reason else "pass",
            reason,
        )
        assert f"{name}." in said and (reason is None or reason in said)
    assert found["absent"]["status"] == "cannot run" and found["absent"]["seconds"] < 60
    assert certificate["counts"] == {"pass": 1, "fail": 7, "cannot run": 1}
    assert found["good"]["measured"] == [
        {"name": "a", "value": 0.5, "relation": "<=", "bound": 1.0, "good": True},
        {"name": "b", "value": 2.0, "relation": "<=", "bound": 3.0, "good": True},
    ]
    assert found["no_number"]["measured"][0]["value"] == "nan"
    assert "nearest to its bound: b 2 <= 3" in said and "note: of a" in said
    assert "ZeroDivisionError" in (tmp_path / "out/raises/log.txt").read_text()
    # Nothing of what hung is left, its child in another session included.
    child = int((tmp_path / "out/hangs/pid").read_text())
    if psutil.pid_exists(child):
        with_time = psutil.Process(child)
        assert with_time.wait(120) is None or not with_time.is_running()


def test_the_certificate_says_what_was_run_and_not_where(certify: Any, tmp_path: Path) -> None:
    code, said = certify("--processes", "3", "--only", "good", "absent", "--output", "out")
    assert code == 0 and "1 passed, 0 failed, 1 cannot run here" in said
    text = (tmp_path / "out/certificate.json").read_text()
    for private in (socket.gethostname(), str(tmp_path), str(Path.home())):
        assert private not in text
    certificate = json.loads(text)
    assert certificate["schema_version"] == 1 and certificate["num_devices"] == 3
    assert certificate["machine"]["platform"] == "cpu" and certificate["machine"]["gpus"] == []
    assert certificate["machine"]["packages"]["torch"].startswith("2.13.0")
    assert [it["check"] for it in certificate["checks"]] == ["good", "absent"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gpus", "8"), "--gpus 8: torch sees 0 here; --processes N runs on the CPU"),
        (("--processes", "2", "--only", "goood"), "did you mean 'good'?"),
        (("--processes", "2", "--model", "none"), "--model none: no folder with a config.json"),
        (("--processes", "2", "--data", "none"), "--data none: no such file"),
        (("--processes", "2", "--json", "none/x.json"), "--json none/x.json: no folder none"),
        (("--processes", "2", "--output", "full"), "exists and is not empty; give a new folder"),
        (("--processes", "0"), "'0' is no positive integer"),
        ((), "one of the arguments --gpus --processes is required"),
    ],
)
def test_bad_input(certify: Any, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    code, output = certify(*words)
    assert code == 2 and said in output
    assert sorted(it.name for it in tmp_path.iterdir()) == ["full"], "something was written"


def test_other_files_are_no_certificate(tmp_path: Path) -> None:
    for text, said in (("{}", "is no certificate"), ('{"schema_version": 9}', "this reads 1")):
        (tmp_path / "it.json").write_text(text)
        with pytest.raises(InputError, match=said):
            read_certificate(tmp_path / "it.json")
