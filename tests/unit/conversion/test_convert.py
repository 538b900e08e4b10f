"""Both formats, all ways between them: the same tensors, the same files beside them.

Sources are folders that transformers itself has written. That Megatron reads these checkpoints and
that what it saves is read is in tests/distributed/test_conversion.py. Left out: real sizes
(tools/bench_conversion.py), float16.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gdpo_megatron.certify.family_models import MODELS
from gdpo_megatron.conversion.convert import Format, convert
from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.hf_io import HFCheckpoint
from gdpo_megatron.conversion.mapping import hf_shapes
from gdpo_megatron.conversion.megatron_io import plan_files
from gdpo_megatron.conversion.megatron_keys import stored_rows
from gdpo_megatron.conversion.model_folder import model_files, open_checkpoint
from gdpo_megatron.conversion.output_folder import manifest_problems
from gdpo_megatron.errors import InputError

Tensors = dict[str, torch.Tensor]


def tensors(folder: Path) -> Tensors:
    arch = load_architecture(model_files(folder))
    checkpoint = open_checkpoint(folder, arch)
    return {name: checkpoint.get(name).clone() for name in hf_shapes(arch)}


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name: str, model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """HF -> Megatron -> Megatron in other files -> HF -> HF in other files, bit for bit.

    The last is compared with what transformers wrote: key set and bytes.
    """
    source = model_folder(name)
    ways: list[tuple[Format, int]] = [
        ("megatron", 30_000),
        ("megatron", 10**9),
        ("hf", 10**9),
        ("hf", 40_000),
    ]
    expected, before = tensors(source), source
    for number, (to, size) in enumerate(ways):
        target = tmp_path / f"{number}"
        convert(before, target, to=to, shard_bytes=size)
        assert_same(tensors(target), expected)
        assert manifest_problems(target) == []
        before = target
    written: Tensors = {}
    for path in sorted((tmp_path / "3").glob("*.safetensors")):
        written |= load_file(path)
    original = load_file(source / "model.safetensors")
    assert written.keys() == original.keys()
    assert all(torch.equal(written[key], original[key]) for key in original)
    for file in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "3" / file).read_bytes() == (source / file).read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_stories(stories_folder: Path, tmp_path: Path) -> None:
    """The real model, its SentencePiece file and its licence among what comes back."""
    convert(stories_folder, tmp_path / "megatron", to="megatron")
    convert(tmp_path / "megatron", tmp_path / "hf", to="hf")
    assert_same(tensors(tmp_path / "hf"), tensors(stories_folder))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"):
        assert (tmp_path / "hf" / name).read_bytes() == (stories_folder / name).read_bytes()


def test_files_beside_the_weights(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    convert(model_folder("gqa"), source, to="hf")
    (source / "manifest.json").unlink()
    (source / "chat_template.jinja").write_text("{{ messages }}\n")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (source / "LICENSE.txt").write_text("terms")
    (source / "modeling_x.py").write_text("raise SystemExit")
    convert(source, tmp_path / "megatron", to="megatron")
    convert(tmp_path / "megatron", tmp_path / "hf", to="hf")
    for name in ("chat_template.jinja", "additional_chat_templates/tools.jinja", "LICENSE.txt"):
        for folder in (tmp_path / "megatron" / "hf", tmp_path / "hf"):
            assert (folder / name).read_bytes() == (source / name).read_bytes()
    assert not list(tmp_path.glob("megatron/**/*.py")) + list(tmp_path.glob("hf/**/*.py"))


@pytest.mark.parametrize("to", ["hf", "megatron"])
def test_dtype(to: Format, model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    source = model_folder("qwen2")
    convert(source, tmp_path / "half", to=to, dtype="bfloat16")
    expected = {name: tensor.bfloat16() for name, tensor in tensors(source).items()}
    assert_same(tensors(tmp_path / "half"), expected)
    config = json.loads((model_files(tmp_path / "half") / "config.json").read_text())
    original = json.loads((source / "config.json").read_text())
    assert config == {**original, "dtype": "bfloat16"}
    assert json.loads((tmp_path / "half" / "manifest.json").read_text())["dtype"] == "bfloat16"


def test_several_dtypes(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """No dtype is right for all of them by itself."""
    source = tmp_path / "mixed"
    convert(model_folder("gqa"), source, to="hf")
    held = load_file(source / "model.safetensors")
    held["model.norm.weight"] = held["model.norm.weight"].bfloat16()
    save_file(held, source / "model.safetensors")
    with pytest.raises(InputError, match="holds bfloat16 and float32; choose one by --dtype"):
        convert(source, tmp_path / "out", to="megatron")
    convert(source, tmp_path / "out", to="megatron", dtype="float32")
    assert_same(tensors(tmp_path / "out"), {k: v.float() for k, v in held_in_order(source).items()})


def held_in_order(folder: Path) -> Tensors:
    arch = load_architecture(folder)
    checkpoint = HFCheckpoint(folder, arch)
    return {name: checkpoint.get(name) for name in hf_shapes(arch)}


def test_manifest(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    source = model_folder("tied")
    done = convert(source, tmp_path / "out", to="megatron")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest == done.manifest
    # V h + L (2 h + (n + 2 g) d h + n d h + 3 f h) + h, V 300, h 64, L 2, n = g = 4, d 16, f 96
    assert manifest["num_parameters"] == 300 * 64 + 2 * (128 + 4 * 64 * 64 + 3 * 96 * 64) + 64
    assert (manifest["kind"], manifest["source"]) == ("megatron", str(source))
    assert manifest["versions"].keys() >= {"torch", "megatron-core", "safetensors"}
    files = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")}
    assert manifest["files"].keys() == files - {"manifest.json"}
    assert {"hf/config.json", ".metadata", "metadata.json", "common.pt"} < files


def test_embedding_has_a_file_of_its_own(model_folder: Callable[[str], Path]) -> None:
    """torch's writer holds the last tensor of each key until a file ends."""
    arch = load_architecture(model_folder("gqa"))
    groups = plan_files(arch, torch.float32, 10**9)
    keys = [{stored.places[0].key for stored in group} for group in groups]
    assert keys[0] == {"embedding.word_embeddings.weight"}
    assert keys[-1] == {"output_layer.weight"}
    assert len(groups) == 3
    assert [s for group in groups for s in group] == stored_rows(arch)


# ---- pytorch_model.bin ---------------------------------------------------------------------------


def bin_folder(source: Path, folder: Path, **options: Any) -> Path:
    """The model of `source` as torch saves it, in one file or two with an index."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    held = load_file(source / "model.safetensors")
    if not options.pop("sharded", False):
        torch.save(held, folder / "pytorch_model.bin", **options)
        return folder
    names = sorted(held)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[:5], names[5:]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: held[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    "options", [{}, {"sharded": True}, {"_use_new_zipfile_serialization": False}]
)
def test_bin(options: dict[str, Any], model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    source = bin_folder(model_folder("gqa"), tmp_path / "bin", **options)
    convert(source, tmp_path / "out", to="hf")
    assert_same(tensors(tmp_path / "out"), tensors(model_folder("gqa")))


def test_safetensors_come_first(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    source = bin_folder(model_folder("gqa"), tmp_path / "both")
    (source / "pytorch_model.bin").write_bytes(b"not even a pickle")
    (source / "model.safetensors").write_bytes(
        (model_folder("gqa") / "model.safetensors").read_bytes()
    )
    convert(source, tmp_path / "out", to="megatron")


class RunsCode:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "code ran")


def test_bin_that_would_run_code(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    source = bin_folder(model_folder("gqa"), tmp_path / "bin")
    torch.save({"model.norm.weight": RunsCode(tmp_path / "ran")}, source / "pytorch_model.bin")
    with pytest.raises(InputError, match="it holds more than tensors, which is not loaded"):
        convert(source, tmp_path / "out", to="hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bin"]


def test_computed_buffers_of_old_llamas(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tmp_path / "old"
    convert(model_folder("gqa"), source, to="hf")
    held = load_file(source / "model.safetensors")
    for layer in range(2):
        held[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(held, source / "model.safetensors")
    convert(source, tmp_path / "out", to="hf")
    assert_same(tensors(tmp_path / "out"), tensors(model_folder("gqa")))
