"""A sandbox with a hole, or without a layer, refuses to serve and says which.

Holes are made on purpose, in the filter, the Landlock rules, the limits or the machine; the probe
has to find each by behaviour. The denial of namespaces and Landlock is a real one, by a seccomp
filter around a process of its own, as container runtimes do it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import start
from harness import quick_config

from gdpo_megatron.sandbox import Sandbox, SandboxUnavailable, layout, pool, syscalls, worker

REPO = Path(__file__).parents[2]


def refusal(mode: str) -> str:
    with pytest.raises(SandboxUnavailable) as refused:
        Sandbox(quick_config(mode)).close()
    return str(refused.value)


def sabotage_guest(monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    """Change the code that is sent inside."""
    boot_message: Callable[..., dict] = worker._boot_message

    def changed(settings):
        message = boot_message(settings)
        text = json.dumps(message["modules"])
        assert json.dumps(old)[1:-1] in text
        changed_text = text.replace(json.dumps(old)[1:-1], json.dumps(new)[1:-1])
        return {**message, "modules": json.loads(changed_text)}

    monkeypatch.setattr(worker, "_boot_message", changed)


GUEST_HOLES = {
    "no seccomp": (
        'confine.enter_filter(instructions, settings["own_pid_offsets"])',
        "pass",
        "an attack got through: fork",
    ),
    "no memory limit": (
        "_limit(resource.RLIMIT_AS, address_space)",
        "pass",
        # The program comes to its end, or on a busy machine to that of its CPU time.
        "the memory limit does not hold: ",
    ),
    "an environment that leaks": (
        "random.seed(0)",
        "random.seed(0); os.environ['GDPO_SANDBOX_CANARY'] = '1'",
        "an attack got through: the caller's environment",
    ),
}


@pytest.mark.parametrize("mode", ["bwrap", "inner"])
@pytest.mark.parametrize("hole", GUEST_HOLES)
def test_hole_in_the_guest(mode: str, hole: str, monkeypatch: pytest.MonkeyPatch):
    start(mode).close()
    old, new, complaint = GUEST_HOLES[hole]
    sabotage_guest(monkeypatch, old, new)
    assert complaint in refusal(mode)


def test_no_landlock_inside(monkeypatch: pytest.MonkeyPatch):
    start("inner").close()
    sabotage_guest(monkeypatch, "confine.enter_ruleset(ruleset)", "pass")
    assert "an attack got through: reading a file" in refusal("inner")


@pytest.mark.parametrize("mode", ["bwrap", "inner"])
@pytest.mark.parametrize(
    ("number", "complaint"),
    [(41, "TCP socket"), (90, "chmod"), (101, "ptrace"), (425, "io_uring"), (57, "fork by number")],
)
def test_hole_in_the_filter(
    mode: str, number: int, complaint: str, monkeypatch: pytest.MonkeyPatch
):
    start(mode).close()
    monkeypatch.setattr(syscalls, "_FREE", {**syscalls._FREE, "hole": {"call": number}})
    assert f"an attack got through: {complaint}" in refusal(mode)


@pytest.mark.parametrize("mode", ["bwrap", "inner"])
def test_folder_too_many(mode: str, monkeypatch: pytest.MonkeyPatch):
    start(mode).close()
    with tempfile.TemporaryDirectory(prefix="gdpo-test-") as folder:  # pytest's own is closed
        Path(folder).chmod(0o755)
        monkeypatch.setattr("tempfile.tempdir", folder)
        monkeypatch.setattr(layout, "_SYSTEM", (*layout._SYSTEM, folder))
        told = refusal(mode)
    assert "an attack got through: reading a file" in told
    assert "the canary was read" not in told  # its text stayed inside; that it was read suffices


@pytest.mark.parametrize("mode", ["bwrap", "inner"])
def test_sandbox_that_blocks_everything(mode: str, monkeypatch: pytest.MonkeyPatch):
    start(mode).close()
    free = {**syscalls._FREE, "open descriptors": {"write": 1}}
    monkeypatch.setattr(syscalls, "_FREE", free)
    assert "an honest program fails" in refusal(mode)


def test_no_bubblewrap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt-get install bubblewrap" in refusal("bwrap")
    with start("inner"), Sandbox(quick_config("auto")) as sandbox:
        assert sandbox.isolation == "inner"


def test_bubblewrap_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    fake = tmp_path / "bwrap"
    fake.write_text(
        "#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2\nexit 1\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "bwrap: bwrap: No permissions to create a new namespace" in refusal("bwrap")


def test_no_landlock(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pool, "landlock_abi", lambda: 0)
    assert "the kernel has no Landlock" in refusal("inner")


def test_bubblewrap_without_landlock(monkeypatch: pytest.MonkeyPatch):
    """Accepted, because the probe passes: the namespace holds nothing to read or write."""
    start("bwrap").close()
    monkeypatch.setattr(pool, "landlock_abi", lambda: 0)
    with Sandbox(quick_config("auto")) as sandbox:
        assert sandbox.isolation == "bwrap"


def test_other_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(syscalls, "supported", lambda: False)
    told = refusal("auto").splitlines()
    assert len(told) == 2
    assert all("Linux on x86_64 only" in line for line in told)


def test_respawned_worker_is_probed_again(monkeypatch: pytest.MonkeyPatch):
    with start("inner") as sandbox:
        sabotage_guest(monkeypatch, "confine.enter_ruleset(ruleset)", "pass")
        (first,) = sandbox._workers
        first.kill()
        done = sandbox.run("print(1)")
        assert done.status == "infra_error"
        assert "an attack got through" in done.detail
        monkeypatch.undo()
        assert sandbox.run("print(1)").stdout == "1\n"


CONTAINER = """
import sys
from gdpo_megatron.config.sandbox import SandboxConfig
from gdpo_megatron.sandbox import Sandbox, SandboxUnavailable
from gdpo_megatron.sandbox.bpf import ALLOW, Argument, Rule, assemble, errno_action
from gdpo_megatron.sandbox.guest import confine
EPERM, ENOSYS = errno_action(1), errno_action(38)
rules = [Rule(number, action=EPERM) for number in (272, 308, 165, 166, 155, 429, 428, 430, 432)]
rules += [Rule(56, (Argument(0, (0x20000,), mask=0x20000),), EPERM), Rule(435, action=ENOSYS)]
rules += [Rule(number, action=ENOSYS) for number in (444, 445, 446) if "landlock" in sys.argv]
confine.give_up_privileges()
confine.enter_filter(assemble(rules, ALLOW), [])
try:
    with Sandbox(SandboxConfig()) as sandbox:
        print(sandbox.isolation, sandbox.run("print(6 * 7)").stdout)
except SandboxUnavailable as error:
    print("REFUSED", *error.problems, sep="\\n")
"""


@pytest.mark.parametrize("denied", ["namespaces", "landlock"])
def test_in_a_container_that_denies(denied: str):
    start("inner").close()
    command = [sys.executable, "-c", CONTAINER, denied]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    if denied == "namespaces":
        assert done.stdout.split() == ["inner", "42"]
    else:
        refused, bwrap, inner = done.stdout.splitlines()
        assert refused == "REFUSED"
        assert bwrap.startswith("sandbox.mode auto cannot be had here: bwrap: ")
        assert "inner: the kernel has no Landlock" in inner
