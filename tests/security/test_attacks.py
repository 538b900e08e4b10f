"""Hostile programs are contained in every mode of this machine, as this user and as nobody.

Not covered: kernels and container runtimes other than this one (docs/sandbox.md lists what was
seen), and attacks on the kernel itself.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from attacks import ATTACKS
from conftest import start
from harness import Bait, problems_of

import gdpo_megatron
from gdpo_megatron.sandbox import Sandbox

NOBODY = 65534
_NEEDED = ("pydantic", "pydantic_core", "annotated_types", "typing_inspection")


def test_there_are_attacks():
    assert len(ATTACKS) >= 30


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_contained(name: str, sandbox: Sandbox, bait: Bait):
    assert problems_of(ATTACKS[name], sandbox, bait) == []


@pytest.fixture(scope="module")
def python_for_nobody() -> Iterator[Path]:
    """A folder that everybody can read, with an interpreter, this package and the harness.

    The user's own may lie below a home folder that is closed to others, and pytest closes its own.
    """
    if os.geteuid() != 0:
        # Right: setuid needs root, and any other user is already the case under test.
        pytest.skip("only root can become nobody; as another user, the tests above say it all")
    with tempfile.TemporaryDirectory(prefix="gdpo-nobody-") as made:
        Path(made).chmod(0o755)
        _fill(Path(made))
        yield Path(made)


def _fill(folder: Path) -> None:
    name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    prefix = Path(sys.base_prefix)
    (folder / "bin").mkdir()
    shutil.copy(prefix / "bin" / name, folder / "bin")
    skip = shutil.ignore_patterns("site-packages", "dist-packages", "test", "__pycache__")
    shutil.copytree(prefix / "lib" / name, folder / "lib" / name, ignore=skip, symlinks=True)
    for library in (prefix / "lib").glob(f"lib{name}*.so*"):
        shutil.copy(library, folder / "lib")
    modules = folder / "modules"
    package = Path(gdpo_megatron.__file__).parent
    for part in ("__init__.py", "errors.py", "config", "sandbox"):
        _copy(package / part, modules / "gdpo_megatron" / part)
    site = Path(sysconfig.get_path("purelib"))
    for part in (*_NEEDED, "typing_extensions.py"):
        _copy(site / part, modules / part)
    for part in ("attacks.py", "harness.py"):
        _copy(Path(__file__).parent / part, modules / part)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


@pytest.mark.parametrize("mode", ["bwrap", "inner"])
def test_as_nobody(mode: str, python_for_nobody: Path):
    """The trainer itself may be an unprivileged user, who has fewer ways to confine."""
    start(mode).close()  # skips where root cannot have it either
    folder = python_for_nobody
    python = next((folder / "bin").iterdir())
    done = subprocess.run(
        [python, folder / "modules" / "harness.py", mode],
        env={
            "PATH": "/usr/bin:/bin",
            "LD_LIBRARY_PATH": str(folder / "lib"),
            "PYTHONPATH": str(folder / "modules"),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if mode == "bwrap" and "unavailable" in found:
        # Right: some hosts allow namespaces to root only; `inner` is then what protects.
        pytest.skip(f"not for an unprivileged user: {found['unavailable']}")
    assert set(found) == set(ATTACKS)
    assert {name: problems for name, problems in found.items() if problems} == {}
