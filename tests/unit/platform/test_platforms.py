"""The two platforms as objects. That a GPU works is not covered: no machine here has one."""

from __future__ import annotations

import importlib.util
import sys

import psutil
import pytest
import torch

from gdpo_megatron.platform import detect_platform
from gdpo_megatron.platform.cpu import CpuPlatform
from gdpo_megatron.platform.cuda import CudaPlatform


@pytest.mark.parametrize(("available", "name"), [(False, "cpu"), (True, "cuda")])
def test_detected(available: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    platform = detect_platform()
    assert platform.name == platform.device.type == name


@pytest.mark.parametrize(("value", "threads"), [(None, 1), ("3", 3)])
def test_cpu_threads(value: str | None, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if value is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    CpuPlatform().setup(0)
    assert seen == [threads]


def test_cpu_memory_is_this_process() -> None:
    """A peak in bytes: at least what is resident now, at most what the machine has."""
    peak = CpuPlatform().memory_probe().peak()
    assert 0.9 * psutil.Process().memory_info().rss <= peak <= psutil.virtual_memory().total


def test_cuda_leaves_megatron_alone() -> None:
    finders, modules = list(sys.meta_path), set(sys.modules)
    CudaPlatform().prepare_megatron()
    # The package around megatron.core is empty; its version is read without an import.
    assert sys.meta_path == finders and set(sys.modules) - modules <= {"megatron"}
    assert dict(CudaPlatform.model_overrides) == {}


def test_cuda_device_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    platform = CudaPlatform()
    platform.setup(1)
    assert chosen == [1] and platform.device == torch.device("cuda:1")
    with pytest.raises(RuntimeError, match="local rank 2 has no GPU: this node shows 2"):
        platform.setup(2)


@pytest.mark.parametrize("installed", [False, True])
def test_transformer_engine_is_for_cuda(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    assert CudaPlatform().has_transformer_engine() == installed
    assert not CpuPlatform().has_transformer_engine()
