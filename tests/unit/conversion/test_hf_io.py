"""Hugging Face folders: what is refused before loading, and exports that are whole or absent."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.hf_io import HFCheckpoint, RandomWeights
from gdpo_megatron.conversion.hf_writer import write_hf_folder
from gdpo_megatron.conversion.mapping import hf_shapes
from gdpo_megatron.errors import InputError

Write = Callable[..., Path]
Tensors = dict[str, torch.Tensor]


def weights(arch: ModelArchitecture, seed: int = 0) -> Tensors:
    source = RandomWeights(arch, seed)
    return {name: source.get(name) for name in hf_shapes(arch)}


def no_tokenizer(folder: Path) -> None: ...


@pytest.fixture
def export(write_config: Write, arch: ModelArchitecture, tmp_path: Path) -> Callable[..., Path]:
    """Write the weights of `arch` (or what is given) to <tmp>/export; returns the folder."""

    def run(tensors: Any = None, **options: Any) -> Path:
        arguments: dict[str, Any] = {
            "dtype": torch.float32,
            "source": write_config("source"),
            "save_tokenizer": no_tokenizer,
            **options,
        }
        folder = tmp_path / "export"
        given = weights(arch).items() if tensors is None else tensors
        write_hf_folder(folder, given, arch, **arguments)
        return folder

    return run


# ---- reading -------------------------------------------------------------------------------------


def test_reads_what_was_written(export: Callable[..., Path], arch: ModelArchitecture) -> None:
    checkpoint = HFCheckpoint(export(), arch)
    for name, tensor in weights(arch).items():
        assert torch.equal(checkpoint.get(name), tensor)


def problems(folder: Path, arch: ModelArchitecture) -> list[str]:
    with pytest.raises(InputError) as caught:
        HFCheckpoint(folder, arch)
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


def rewrite(folder: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_audit_reports_all_at_once(export: Callable[..., Path], arch: ModelArchitecture) -> None:
    folder = export()

    def spoil(tensors: Tensors) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(16)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(16, 24)

    rewrite(folder, spoil)
    found = problems(folder, arch)
    assert sorted(found) == sorted(
        [
            f"{folder}: tensor 'model.norm.weight' is missing",
            f"{folder}: tensor 'model.layers.0.self_attn.q_proj.bias' is not part of llama",
            f"{folder}: tensor 'model.layers.1.mlp.up_proj.weight' has shape [16, 24], "
            "config.json asks for [24, 16]",
        ]
    )


def test_copy_of_a_tied_embedding_is_left_out(write_config: Write, tmp_path: Path) -> None:
    """Some tools write lm_head beside a tied embedding; untied, it is a tensor like others."""
    tied = load_architecture(write_config("tied", tie_word_embeddings=True))
    folder = tmp_path / "tied"
    save_file(
        {**weights(tied), "lm_head.weight": torch.zeros(19, 16)}, folder / "model.safetensors"
    )
    HFCheckpoint(folder, tied)
    untied = load_architecture(write_config("untied"))
    save_file(weights(tied), tmp_path / "untied" / "model.safetensors")
    assert problems(tmp_path / "untied", untied) == [
        f"{tmp_path / 'untied'}: tensor 'lm_head.weight' is missing"
    ]


def test_no_weights(write_config: Write, arch: ModelArchitecture) -> None:
    folder = write_config("empty")
    assert problems(folder, arch) == [
        f"{folder} holds no weights (model.safetensors or model.safetensors.index.json)"
    ]


@pytest.mark.parametrize("keep", [0, 7, 0.5, -1], ids=["empty", "no header", "half", "one short"])
def test_truncated(keep: float, export: Callable[..., Path], arch: ModelArchitecture) -> None:
    path = export() / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep == 0.5 else int(keep)])
    (problem,) = problems(path.parent, arch)
    assert problem.startswith(f"{path}: damaged file: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update({"model.norm.weight": "../../stolen.safetensors"}), "points outside"),
        (lambda m: m.update({"model.norm.weight": "/etc/passwd"}), "'/etc/passwd' points outside"),
        (lambda m: m.update({"model.norm.weight": "gone.safetensors"}), "gone.safetensors is mis"),
        (lambda m: m.update({"model.norm.weight": 3}), "is not a map of names to files"),
        (lambda m: m.pop("model.norm.weight"), "tensor 'model.norm.weight' is missing"),
        (lambda m: m.update({"more": next(iter(m.values()))}), "tensor 'more' is not part of"),
    ],
)
def test_bad_index(
    change: Callable[[dict[str, Any]], None],
    message: str,
    export: Callable[..., Path],
    arch: ModelArchitecture,
) -> None:
    folder = export(shard_bytes=2000)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    (problem,) = problems(folder, arch)
    assert message in problem and str(folder) in problem


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}'])
def test_index_that_is_none(
    text: str, export: Callable[..., Path], arch: ModelArchitecture
) -> None:
    folder = export(shard_bytes=2000)
    (folder / "model.safetensors.index.json").write_text(text)
    (problem,) = problems(folder, arch)
    assert "model.safetensors.index.json" in problem


def test_index_names_the_wrong_file(export: Callable[..., Path], arch: ModelArchitecture) -> None:
    folder = export(shard_bytes=2000)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    assert index["weight_map"]["model.norm.weight"] != files[0]
    index["weight_map"]["model.norm.weight"] = files[0]
    path.write_text(json.dumps(index))
    assert problems(folder, arch) == [
        f"{path}: {files[0]} does not hold tensor 'model.norm.weight'"
    ]


def test_stories(stories_folder: Path) -> None:
    arch = load_architecture(stories_folder)
    checkpoint = HFCheckpoint(stories_folder, arch)
    assert sum(checkpoint.get(name).numel() for name in hf_shapes(arch)) == 260_032


# ---- new weights ---------------------------------------------------------------------------------


def test_random_weights_depend_on_seed_and_name_alone(arch: ModelArchitecture) -> None:
    forward, backward = RandomWeights(arch, 5), RandomWeights(arch, 5)
    names = list(hf_shapes(arch))
    first = {name: forward.get(name) for name in names}
    torch.manual_seed(123)
    second = {name: backward.get(name) for name in reversed(names)}
    other = weights(arch, 6)
    drawn = [name for name in names if not name.endswith("norm.weight")]
    for name in names:
        assert torch.equal(first[name], second[name])
        assert first[name].shape == hf_shapes(arch)[name] and first[name].dtype == torch.float32
    for name in drawn:
        assert not torch.equal(first[name], other[name])
    alike = "model.layers.{}.self_attn.q_proj.weight"
    assert not torch.equal(first[alike.format(0)], first[alike.format(1)])


def test_random_weights_do_not_touch_the_global_generator(arch: ModelArchitecture) -> None:
    state = torch.get_rng_state()
    weights(arch)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_weights_have_the_stated_spread(write_config: Write) -> None:
    """std initializer_range; output projections 1/sqrt(2 L) of it; norms 1."""
    folder = write_config(
        "wide",
        hidden_size=128,
        intermediate_size=256,
        vocab_size=200,
        num_hidden_layers=8,
        initializer_range=0.06,
    )
    tensors = weights(load_architecture(folder))
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            assert (tensor == 1).all()
            continue
        output = name.endswith(("o_proj.weight", "down_proj.weight"))
        expected = 0.06 / 4 if output else 0.06
        # Four standard errors of a standard deviation of n values.
        slack = 4 * expected / (2 * tensor.numel()) ** 0.5
        assert float(tensor.std()) == pytest.approx(expected, abs=slack), name
        assert abs(float(tensor.mean())) < 4 * expected / tensor.numel() ** 0.5, name


# ---- writing -------------------------------------------------------------------------------------


def test_shards(export: Callable[..., Path], arch: ModelArchitecture) -> None:
    """Files are filled in order up to shard_bytes; a larger tensor has one of its own."""
    folder = export(shard_bytes=2000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = weights(arch)
    assert list(index["weight_map"]) == list(tensors)
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in tensors.values())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert files == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    assert not (folder / "model.safetensors").exists()
    sizes = []
    for name in files:
        held = load_file(folder / name)
        assert held.keys() == {t for t, file in index["weight_map"].items() if file == name}
        sizes.append((sum(t.numel() * 4 for t in held.values()), len(held)))
    assert all(size <= 2000 or count == 1 for size, count in sizes)
    # No two neighbours would have fitted into one file.
    assert all(a[0] + b[0] > 2000 for a, b in pairwise(sizes))
    checkpoint = HFCheckpoint(folder, arch)
    assert all(torch.equal(checkpoint.get(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [2000, 2**30])
def test_transformers_loads_it(
    tied: bool, shard_bytes: int, write_config: Write, tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    source = write_config("source", tie_word_embeddings=tied, torch_dtype="float16")
    arch = load_architecture(source)
    tensors = weights(arch)
    write_hf_folder(
        tmp_path / "export",
        tensors.items(),
        arch,
        dtype=torch.float32,
        source=source,
        save_tokenizer=no_tokenizer,
        shard_bytes=shard_bytes,
    )
    model, report = LlamaForCausalLM.from_pretrained(
        tmp_path / "export", output_loading_info=True, dtype="auto", local_files_only=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    assert model.lm_head.weight.dtype == torch.float32
    assert torch.equal(model.lm_head.weight, state["model.embed_tokens.weight"]) == tied


def test_dtype(export: Callable[..., Path], arch: ModelArchitecture) -> None:
    folder = export(dtype=torch.bfloat16)
    checkpoint = HFCheckpoint(folder, arch)
    for name, tensor in weights(arch).items():
        assert torch.equal(checkpoint.get(name), tensor.bfloat16())
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config


def test_files_besides_weights(write_config: Write, export: Callable[..., Path]) -> None:
    source = write_config("source")
    (source / "generation_config.json").write_text('{"eos_token_id": 7}')

    def save_tokenizer(folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")

    folder = export(source=source, save_tokenizer=save_tokenizer)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": 7}
    written, given = (json.loads((f / "config.json").read_text()) for f in (folder, source))
    assert written == {**given, "dtype": "float32"}


def test_views_and_buffers_that_are_reused(
    export: Callable[..., Path], arch: ModelArchitecture
) -> None:
    """The stream may yield parts of a buffer that it writes over right after."""
    buffer = torch.empty(4096)

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights(arch).items():
            part = buffer[: tensor.numel()].view(tensor.shape)
            part.copy_(tensor)
            yield name, part
            buffer.fill_(-1)

    checkpoint = HFCheckpoint(export(stream()), arch)
    assert all(torch.equal(checkpoint.get(n), t) for n, t in weights(arch).items())


def drop(tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    yield from list(tensors.items())[:-1]


def repeat(tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    yield from [*tensors.items(), next(iter(tensors.items()))]


def rename(tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((name.replace("norm", "norms"), tensor) for name, tensor in tensors.items())


def reshape(tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((name, tensor.T) for name, tensor in tensors.items())


def break_off(tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    yield from list(tensors.items())[:3]
    raise RuntimeError("export: a rank died")


@pytest.mark.parametrize("spoil", [drop, repeat, rename, reshape, break_off])
def test_failure_keeps_the_old_export(
    spoil: Callable[[Tensors], Any], export: Callable[..., Path], arch: ModelArchitecture
) -> None:
    """A wrong stream ends the export; what stood there before still stands, whole."""
    old = weights(arch, 1)
    folder = export(old.items())
    (folder / "note.txt").write_text("of the old one")
    with pytest.raises(RuntimeError, match="export: "):
        export(spoil(weights(arch, 2)))
    checkpoint = HFCheckpoint(folder, arch)
    assert all(torch.equal(checkpoint.get(name), tensor) for name, tensor in old.items())
    assert (folder / "note.txt").exists()
    # The next one clears what was left and replaces the old one entirely.
    new = weights(arch, 2)
    export(new.items())
    assert torch.equal(HFCheckpoint(folder, arch).get("lm_head.weight"), new["lm_head.weight"])
    assert not (folder / "note.txt").exists()
    assert {path.name for path in folder.parent.iterdir()} == {"arch", "source", "export"}


def test_export_over_its_own_source(write_config: Write, tmp_path: Path) -> None:
    folder = write_config("model")
    arch = load_architecture(folder)
    for seed in (1, 2):
        write_hf_folder(
            folder,
            weights(arch, seed).items(),
            arch,
            dtype=torch.float32,
            source=folder,
            save_tokenizer=no_tokenizer,
        )
    got = HFCheckpoint(folder, load_architecture(folder)).get("lm_head.weight")
    assert torch.equal(got, weights(arch, 2)["lm_head.weight"])
