"""FP8 that cannot run is refused in the launcher, with what is missing; nothing falls back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.cli_job import Cli, Job, Outcome

from gdpo_megatron import validate_fp8
from gdpo_megatron.platform.cpu import CpuPlatform
from gdpo_megatron.platform.cuda import CudaPlatform

ON = ("--precision.fp8.backend", "scaled_mm")
NOT_BUILT = "is FP8 of Transformer Engine, which is not built; backends and their recipes: "


def lines(run_cli: Cli, *arguments: str, command: str = "train") -> list[str]:
    config = "sft.yaml" if command == "sft" else "config.yaml"
    outcome = run_cli(command, config, *arguments)
    assert outcome.code == 2 and outcome.out == "", outcome
    return [line.removeprefix("gdpo-megatron: ") for line in outcome.err.splitlines()]


@pytest.mark.parametrize("command", ["train", "sft"])
def test_the_job_is_right_with_fp8(job: Job, run_cli: Cli, command: str) -> None:
    """Otherwise the tests below would show nothing."""
    config = "sft.yaml" if command == "sft" else "config.yaml"
    every = ("--precision.fp8.parity_check.every", "5")
    assert run_cli(command, config, *ON, *every, "--nproc", "1") == Outcome(0, "", "")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--precision.fp8.backend", "te"), f"precision.fp8.backend: 'te' {NOT_BUILT}"),
        (
            (*ON, "--precision.fp8.recipe", "delayed"),
            f"precision.fp8.recipe: 'delayed' {NOT_BUILT}",
        ),
        (
            ("--precision.fp8.recipe", "tensorwise"),
            "precision.fp8.backend: missing; needs one of scaled_mm",
        ),
        (
            (*ON, "--precision.fp8.recipe", "rowwise"),
            'precision.fp8.recipe: "rowwise" is not allowed; needs one of tensorwise',
        ),
        (
            (*ON, "--precision.fp8.parity_check.min_grad_cosine", "1"),
            "precision.fp8.parity_check.min_grad_cosine: 1 is not allowed; needs float > 0 and < 1",
        ),
    ],
    ids=["te", "a recipe of te", "no backend", "unknown recipe", "cosine"],
)
def test_keys(job: Job, run_cli: Cli, arguments: tuple[str, ...], expected: str) -> None:
    (line,) = lines(run_cli, *arguments)
    assert line.startswith(expected)


def test_sizes_that_kernels_cannot_multiply(job: Job, run_cli: Cli) -> None:
    """The model's MLP has 96 columns: 24 on each of four ranks."""
    tp = ("--parallel.tensor_model_parallel_size", "4", "--nproc", "4")
    assert lines(run_cli, *ON, *tp) == [
        "precision.fp8: the model's inputs of linear_fc2 are 24 (96 shared by 4 ranks), no "
        "multiple of 16, which FP8 kernels need; set precision.fp8: null, or a smaller "
        "parallel.tensor_model_parallel_size"
    ]


def test_no_layer_left(job: Job, run_cli: Cli) -> None:
    section = "--precision.fp8.num_"
    first, last = f"{section}first_layers_in_params_dtype", f"{section}last_layers_in_params_dtype"
    assert lines(run_cli, *ON, first, "1", last, "1") == [
        "precision.fp8: num_first_layers_in_params_dtype 1 and num_last_layers_in_params_dtype 1 "
        "leave none of the model's 2 layers for FP8; lower them, or set precision.fp8: null"
    ]


def test_experts(
    job: Job,
    run_cli: Cli,
    model_folder: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (job.folder / "model").unlink()
    (job.folder / "model").symlink_to(model_folder("mixtral"))
    capsys.readouterr()  # what transformers says when it writes a model
    assert lines(run_cli, *ON) == [
        "precision.fp8: mixtral has experts, whose layers are not built in FP8; "
        "set precision.fp8: null"
    ]


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_gpu_without_fp8(
    job: Job, run_cli: Cli, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(validate_fp8, "detect_platform", CudaPlatform)
    assert lines(run_cli, *ON, command=command) == [
        "precision.fp8: scaled_mm needs a GPU of compute capability 8.9 or higher (Ada, Hopper); "
        "NVIDIA A100 has 8.0; set precision.fp8: null"
    ]


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0)])
def test_gpus_with_fp8(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert CudaPlatform().missing_for_fp8() is None


def test_a_cpu_has_it() -> None:
    assert CpuPlatform().missing_for_fp8() is None
