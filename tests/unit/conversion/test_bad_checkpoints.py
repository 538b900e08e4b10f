"""Damaged, foreign and dangerous model folders: one clear line each, and no output folder."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import Metadata

from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.conversion.checks import num_non_finite
from gdpo_megatron.conversion.convert import convert
from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.hf_io import RandomWeights
from gdpo_megatron.conversion.hf_writer import hf_tensors, write_hf_folder
from gdpo_megatron.conversion.megatron_metadata import read_metadata
from gdpo_megatron.errors import InputError

Write = Callable[..., Path]
Change = Callable[[Path], None]


@pytest.fixture
def hf(write_config: Write, arch: ModelArchitecture, tmp_path: Path) -> Path:
    """A small model in several safetensors files."""
    write_hf_folder(
        tmp_path / "hf",
        hf_tensors(RandomWeights(arch, 0), arch),
        arch,
        dtype=torch.float32,
        source=write_config("config"),
        save_tokenizer=lambda folder: None,
        shard_bytes=4000,
    )
    return tmp_path / "hf"


@pytest.fixture
def megatron(hf: Path, tmp_path: Path) -> Path:
    convert(hf, tmp_path / "megatron", to="megatron", shard_bytes=4000)
    return tmp_path / "megatron"


def refused(source: Path, tmp_path: Path, to: Any, **options: Any) -> str:
    """The one line that a conversion is refused with; nothing is left of it."""
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(InputError) as caught:
        convert(source, tmp_path / "out", to=to, shard_bytes=4000, **options)
    assert {path.name for path in tmp_path.iterdir()} == before
    (problem,) = caught.value.problems
    assert "\n" not in problem
    return problem


# ---- Hugging Face --------------------------------------------------------------------------------


def shard_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def change_shard(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    path = shard_of(folder, name)
    held = load_file(path)
    change(held)
    save_file(held, path)


NORM = "model.norm.weight"


def truncate(folder: Path) -> None:
    path = shard_of(folder, NORM)
    path.write_bytes(path.read_bytes()[:-1])


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def point_outside(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][NORM] = "../hf/" + index["weight_map"][NORM]
    path.write_text(json.dumps(index))


HF_DAMAGE: list[tuple[str, Change, str]] = [
    ("truncated shard", truncate, "damaged file: "),
    ("missing tensor", lambda f: change_shard(f, NORM, lambda t: t.pop(NORM)), "does not hold"),
    (
        "extra tensor, not in the index",
        lambda f: change_shard(f, NORM, lambda t: t.update(more=torch.zeros(2))),
        "tensor 'more' is not part of llama",
    ),
    (
        "wrong shape",
        lambda f: change_shard(f, NORM, lambda t: t.update({NORM: torch.zeros(15)})),
        "tensor 'model.norm.weight' has shape [15], config.json asks for [16]",
    ),
    (
        "quantised",
        lambda f: change_shard(f, NORM, lambda t: t.update({NORM: torch.zeros(16).to(torch.int8)})),
        "tensor 'model.norm.weight' is int8; quantised checkpoints are not supported",
    ),
    ("index outside", point_outside, "points outside the folder"),
    ("unknown", lambda f: edit_config(f, model_type="gpt2"), "gpt2"),
    ("no config", lambda f: (f / "config.json").unlink(), "has no config.json"),
    ("bad config", lambda f: (f / "config.json").write_text("{"), "line 1: not JSON"),
]


@pytest.mark.parametrize("to", ["megatron", "hf"])
@pytest.mark.parametrize(
    ("change", "message"), [row[1:] for row in HF_DAMAGE], ids=[row[0] for row in HF_DAMAGE]
)
def test_damaged_hugging_face(
    change: Change, message: str, to: str, hf: Path, tmp_path: Path
) -> None:
    change(hf)
    assert message in refused(hf, tmp_path, to)


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ([1.0, -2.0], 0),
        ([1.0, float("inf")], 1),
        ([float("-inf"), 1.0], 1),
        ([float("nan"), 1.0, float("inf")], 2),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_num_non_finite(values: list[float], count: int, dtype: torch.dtype) -> None:
    assert num_non_finite(torch.tensor(values, dtype=dtype)) == count


@pytest.mark.parametrize("to", ["megatron", "hf"])
def test_not_finite(to: Any, hf: Path, tmp_path: Path) -> None:
    """A warning with names and numbers, on the screen and in the manifest; the values stay."""

    def spoil(held: dict[str, Any]) -> None:
        held[NORM][2:5] = torch.tensor([float("nan"), float("inf"), float("-inf")])

    change_shard(hf, NORM, spoil)
    told: list[str] = []

    class Told:
        def begin(self, num_bytes: int, num_files: int) -> None: ...
        def advance(self, file: str, num_bytes: int) -> None: ...
        def message(self, text: str) -> None:
            told.append(text)

    done = convert(hf, tmp_path / "out", to=to, progress=Told())
    assert told == ["warning: model.norm.weight: 3 values are not finite"]
    assert done.manifest["non_finite"] == {NORM: 3}


# ---- Megatron ------------------------------------------------------------------------------------


def edit_metadata(folder: Path, change: Callable[[Metadata], None]) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


KEY = "decoder.final_layernorm.weight"


def resize(metadata: Metadata) -> None:
    entry: Any = metadata.state_dict_metadata[KEY]
    entry.size = torch.Size([15])


def add_parameter(metadata: Metadata) -> None:
    metadata.state_dict_metadata["decoder.extra.weight"] = metadata.state_dict_metadata[KEY]


def add_adapter(metadata: Metadata) -> None:
    key = "decoder.layers.lora.q_proj.a"
    metadata.state_dict_metadata[key] = metadata.state_dict_metadata[KEY]


def lose_chunk(metadata: Metadata) -> None:
    entry: Any = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"]
    del entry.chunks[1]


def store_outside(metadata: Metadata) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = f"../megatron/{info.relative_path}"


def truncate_last(folder: Path) -> None:
    path = max(folder.glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-1])


def zero_file(folder: Path) -> None:
    path = folder / "__2_0.distcp"  # others are written before it is read
    path.write_bytes(bytes(path.stat().st_size))


MEGATRON_DAMAGE: list[tuple[str, Change, str]] = [
    ("truncated", truncate_last, "damaged file: its end is missing"),
    ("file gone", lambda f: (f / "__1_0.distcp").unlink(), "__1_0.distcp: is missing"),
    ("zeros", zero_file, " cannot be read: its bytes are damaged"),
    (
        "missing parameter",
        lambda f: edit_metadata(f, lambda m: m.state_dict_metadata.pop(KEY)),
        f"parameter '{KEY}' is missing",
    ),
    ("wrong shape", lambda f: edit_metadata(f, resize), f"'{KEY}' has shape [15]"),
    (
        "extra parameter",
        lambda f: edit_metadata(f, add_parameter),
        "parameter 'decoder.extra.weight' is not part of llama",
    ),
    ("LoRA run", lambda f: edit_metadata(f, add_adapter), "use the run's hf folder, <run_dir>/hf,"),
    ("chunk gone", lambda f: edit_metadata(f, lose_chunk), "linear_fc2.weight' is not whole"),
    ("file outside", lambda f: edit_metadata(f, store_outside), "points outside the folder"),
    ("metadata cut", lambda f: (f / ".metadata").write_bytes(b"\x80\x04"), ".metadata: damaged"),
    ("no metadata.json", lambda f: (f / "metadata.json").unlink(), "metadata.json is missing"),
    (
        "other format",
        lambda f: (f / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
        "format 'zarr' is not supported; choices: torch_dist",
    ),
    ("unknown", lambda f: edit_config(f / "hf", model_type="gpt2"), "gpt2"),
    (
        "no config",
        lambda f: (f / "hf" / "config.json").unlink(),
        "a Megatron checkpoint without hf/config.json",
    ),
]


@pytest.mark.parametrize(
    ("change", "message"),
    [row[1:] for row in MEGATRON_DAMAGE],
    ids=[row[0] for row in MEGATRON_DAMAGE],
)
def test_damaged_megatron(change: Change, message: str, megatron: Path, tmp_path: Path) -> None:
    change(megatron)
    assert message in refused(megatron, tmp_path, "hf")


def test_a_checkpoint_with_adapters_names_the_export_of_its_run(
    megatron: Path, tmp_path: Path
) -> None:
    step = tmp_path / "run" / "checkpoints" / "step_00000002"
    step.parent.mkdir(parents=True)
    edit_metadata(megatron, add_adapter)
    megatron.rename(step)
    said = refused(step, tmp_path, "hf")
    assert f"{step}: has LoRA adapters" in said
    assert f"use the run's hf folder, {tmp_path / 'run' / 'hf'}, which has them merged" in said


def test_config_from_elsewhere(megatron: Path, hf: Path, tmp_path: Path) -> None:
    (megatron / "hf" / "config.json").unlink()
    convert(megatron, tmp_path / "out", to="hf", hf_files=hf)
    assert load_architecture(tmp_path / "out") == load_architecture(hf)


class RunsCode:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "code ran")


def test_metadata_that_would_run_code(megatron: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    def plant(metadata: Any) -> None:
        metadata.planner_data = RunsCode(ran)

    edit_metadata(megatron, plant)
    problem = refused(megatron, tmp_path, "hf")
    assert ".metadata: damaged file: it names " in problem and "no checkpoint needs" in problem
    assert not ran.exists()
    pickle.loads((megatron / ".metadata").read_bytes())
    assert ran.exists()  # it would have


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"ctorch\nload\n(S'x'\ntR.",
        b"ctorch.serialization\n_get_layout.__globals__\n.",
        pickle.dumps({"no": "metadata"}),
        b"",
    ],
)
def test_only_records_are_created(data: bytes, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(InputError, match="damaged file"):
        read_metadata(tmp_path / ".metadata")
