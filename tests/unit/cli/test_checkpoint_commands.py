"""`convert` and `verify` as a person uses them, and the tools of the same names.

`verify` runs in processes of its own: it makes a process group, of one. Left out: how the progress
looks on a terminal.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cli_job import Cli

from gdpo_megatron.layer_values import Comparison

ROOT = Path(__file__).resolve().parents[3]
TOOLS = ("convert_hf_to_megatron", "convert_megatron_to_hf", "verify_checkpoint")


def tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
    )


def test_convert(model_folder: Callable[[str], Path], run_cli: Cli, tmp_path: Path) -> None:
    source, target = model_folder("gqa"), tmp_path / "out"
    size = ("--max-shard-size", "60KB")
    outcome = run_cli("convert", str(source), str(target), "--to", "megatron", *size)
    assert outcome.code == 0 and "gdpo-megatron" not in outcome.err
    lines = outcome.out.splitlines()
    assert re.fullmatch(rf"{target}: [\d,]+ parameters of llama, float32, [\d,]+ bytes", lines[-1])
    files = sorted(path.name for path in target.glob("*.distcp"))
    assert len(files) > 3
    # One line per file where nothing can be redrawn.
    assert [line.split("file ")[1].split()[0] for line in lines[:-1]] == [
        f"{number}/{len(files)}".rjust(len(f"{len(files)}") * 2 + 1).strip()
        for number in range(1, len(files) + 1)
    ]
    again = run_cli("convert", str(source), str(target), "--to", "megatron")
    assert (again.code, again.out) == (2, "")
    assert again.err == (
        f"gdpo-megatron: {target}: exists; give another name, or --overwrite to replace it\n"
    )
    assert run_cli("convert", str(source), str(target), "--to", "hf", "--overwrite").code == 0
    assert (target / "model.safetensors").is_file() and not list(target.glob("*.distcp"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "out", "--to", "hf"), "gdpo-megatron: no folder nowhere\n"),
        ((".", "out"), "the following arguments are required: --to"),
        ((".", "out", "--to", "gguf"), "invalid choice: 'gguf'"),
        ((".", "out", "--to", "hf", "--max-shard-size", "5 bananas"), "'5 bananas' is no size"),
        ((".", "out", "--to", "hf", "--max-shard-size", "0"), "'0' is no size"),
        ((".", "out", "--to", "hf", "--dtype", "int8"), "invalid choice: 'int8'"),
        ((".", "out", "--to", "hf", "--fast"), "unknown arguments: --fast"),
    ],
)
def test_bad_arguments(
    arguments: tuple[str, ...],
    message: str,
    run_cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run_cli("convert", *arguments)
    assert outcome.code == 2 and message in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_warning(model_folder: Callable[[str], Path], run_cli: Cli, tmp_path: Path) -> None:
    source = tmp_path / "source"
    assert run_cli("convert", str(model_folder("gqa")), str(source), "--to", "hf").code == 0
    held = load_file(source / "model.safetensors")
    held["model.norm.weight"][3] = float("nan")
    save_file(held, source / "model.safetensors")
    outcome = run_cli("convert", str(source), str(tmp_path / "out"), "--to", "hf")
    assert outcome.code == 0
    assert outcome.err == "gdpo-megatron: warning: model.norm.weight: 1 values are not finite\n"


@pytest.mark.parametrize("name", TOOLS)
def test_tools_answer(name: str) -> None:
    outcome = tool(name, "--help")
    assert outcome.returncode == 0 and outcome.stderr == ""
    assert ("--max-shard-size" if "convert" in name else "--tolerance-factor") in outcome.stdout
    bad = tool(name, "/nowhere", *(["/out"] if "convert" in name else []))
    assert bad.returncode == 2 and bad.stderr.startswith(f"{name}.py: ")
    assert bad.stderr.count("\n") == 1


# ---- verify --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<folder>/hf and <folder>/megatron, converted by the tools."""
    folder = tmp_path_factory.mktemp("verify")
    for name, source, target in (
        ("convert_hf_to_megatron", model_folder("qwen3_moe"), folder / "megatron"),
        ("convert_megatron_to_hf", folder / "megatron", folder / "hf"),
    ):
        outcome = tool(name, source, target)
        assert outcome.returncode == 0, outcome.stderr
    return folder


def rows(output: str) -> dict[str, list[float]]:
    """Name -> numbers of the printed table."""
    found: dict[str, list[float]] = {}
    for line in output.splitlines():
        if match := re.fullmatch(r"  ([a-z][a-z 0-9]*?) +((?:[\d.e+-]+ *|nan *){4})", line):
            found[match[1]] = [float(number) for number in match[2].split()]
    return found


LAYERS = [f"layer {index} {part}" for index in range(2) for part in ("attention", "mlp")]
NAMES = ["embedding", *LAYERS, "final norm", "logits"]


def test_verify(folders: Path) -> None:
    """Both formats of a mixture of experts against transformers, which reads the HF folder."""
    outcome = tool("verify_checkpoint", folders / "megatron", folders / "hf")
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert outcome.stdout.count("all files as manifest.json has them") == 2
    assert re.search(r"^(\d+) of \1 tensors are bit-identical$", outcome.stdout, re.M)
    table = rows(outcome.stdout)
    assert list(table) == NAMES
    assert table["embedding"][1:3] == [0, 0]
    assert 0 < table["logits"][2] < 1e-5
    assert ", within " in outcome.stdout.splitlines()[-1]


def test_verify_without_hugging_face_folder(folders: Path) -> None:
    """transformers is given the tensors; prompts are texts of the tokenizer that was carried."""
    prompts = ("--prompt", "the cat", "--prompt", "sat on the mat")
    outcome = tool("verify_checkpoint", folders / "megatron", *prompts)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert list(rows(outcome.stdout)) == NAMES


def test_verify_finds_the_layer(folders: Path, tmp_path: Path) -> None:
    """One value of layer 1 is another: files, tensors, and the table from there on."""
    spoilt = tmp_path / "spoilt"
    assert tool("convert_megatron_to_hf", folders / "megatron", spoilt).returncode == 0
    held = load_file(spoilt / "model.safetensors")
    held["model.layers.1.self_attn.o_proj.weight"][0, 0] += 0.5
    save_file(held, spoilt / "model.safetensors")
    outcome = tool("verify_checkpoint", folders / "megatron", spoilt)
    assert outcome.returncode == 1
    assert f"{spoilt}: model.safetensors has " in outcome.stdout
    assert (
        "model.layers.1.self_attn.o_proj.weight: 1 of 6,144 values differ, by 0.5" in outcome.stdout
    )
    table = rows(outcome.stdout)
    assert table["layer 0 mlp"][2] < 1e-5 and table["layer 1 mlp"][2] > 1e-3
    assert ", MORE THAN " in outcome.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("rounding", "factor", "limit"), [(0.0, 1.0, 2e-6), (3e-6, 1.0, 1.2e-5), (3e-6, 10.0, 1.2e-4)]
)
def test_allowed(rounding: float, factor: float, limit: float) -> None:
    row = Comparison(name="logits", largest=9.0, difference=1.0, relative=0.1, rounding=rounding)
    assert row.allowed(factor) == pytest.approx(limit)


def test_verify_without_logits(folders: Path, run_cli: Cli, tmp_path: Path) -> None:
    half = tmp_path / "half"
    hf = str(folders / "hf")
    run_cli("convert", hf, str(half), "--to", "hf", "--dtype", "bfloat16")
    outcome = run_cli("verify", hf, str(half), "--no-logits")
    assert outcome.code == 1
    assert "lm_head.weight: float32 and bfloat16" in outcome.out
    assert "0 of 45 tensors are bit-identical" in outcome.out
    held = load_file(half / "model.safetensors")
    held["lm_head.weight"][0, 0] = torch.inf
    save_file(held, half / "model.safetensors")
    (half / "manifest.json").unlink()
    outcome = run_cli("verify", str(half), "--no-logits")
    assert outcome.code == 0
    assert "no manifest.json" in outcome.out
    assert f"warning: {half}: lm_head.weight: 1 values are not finite" in outcome.out
