"""Reading and writing Hugging Face model folders: safetensors only, one tensor at a time.

A checkpoint is checked against the tensors that its config asks for before anything is loaded, and
an export appears under its name only when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gdpo_megatron.conversion.architecture import ModelArchitecture, read_json
from gdpo_megatron.conversion.mapping import hf_shapes
from gdpo_megatron.errors import InputError

_MAX_PROBLEMS = 20
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class HFCheckpoint:
    """The tensors of a Hugging Face folder, read on demand.

    Raises:
        InputError: no safetensors, a tensor missing, left over, or of the wrong shape.
    """

    def __init__(self, folder: Path, arch: ModelArchitecture):
        self.folder = folder
        self._open: dict[str, Any] = {}
        self._files = self._locate()
        self._audit(arch)

    def _locate(self) -> dict[str, str]:
        """Tensor name -> file name within the folder."""
        index = self.folder / _INDEX
        if index.is_file():
            weight_map = _read_weight_map(index)
            for file_name in set(weight_map.values()):
                if Path(file_name).name != file_name:
                    raise InputError(f"{index}: '{file_name}' points outside the folder")
                if not (self.folder / file_name).is_file():
                    raise InputError(f"{index}: {file_name} is missing from the folder")
            return weight_map
        if not (self.folder / _SINGLE).is_file():
            raise InputError(
                f"model.hf_path: {self.folder} holds no weights ({_SINGLE} or {_INDEX}); "
                "set model.init: random to draw new ones"
            )
        return dict.fromkeys(self._handle(_SINGLE).keys(), _SINGLE)

    def _handle(self, file_name: str) -> Any:
        if file_name not in self._open:
            try:
                self._open[file_name] = safe_open(self.folder / file_name, framework="pt")
            except SafetensorError as error:
                raise InputError(f"{self.folder / file_name}: damaged file: {error}") from error
        return self._open[file_name]

    def _audit(self, arch: ModelArchitecture) -> None:
        expected = hf_shapes(arch)
        problems = [
            f"{self.folder}: tensor '{name}' is missing"
            for name in expected
            if name not in self._files
        ]
        for name, file_name in self._files.items():
            if name not in expected:
                # Written by some tools although it is the embedding.
                if name == "lm_head.weight" and arch.tie_word_embeddings:
                    continue
                problems.append(f"{self.folder}: tensor '{name}' is not part of {arch.family}")
                continue
            try:
                shape = tuple(self._handle(file_name).get_slice(name).get_shape())
            except SafetensorError:
                problems.append(
                    f"{self.folder / _INDEX}: {file_name} does not hold tensor '{name}'"
                )
                continue
            if shape != expected[name]:
                problems.append(
                    f"{self.folder}: tensor '{name}' has shape {list(shape)}, "
                    f"config.json asks for {list(expected[name])}"
                )
        if problems:
            more = len(problems) - _MAX_PROBLEMS
            rest = [f"{self.folder}: {more} more problems"] if more > 0 else []
            raise InputError(problems[:_MAX_PROBLEMS] + rest)

    def get(self, name: str) -> Tensor:
        """The full tensor of a name, on the CPU, in the dtype of the file."""
        return self._handle(self._files[name]).get_tensor(name)


def _read_weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(
        isinstance(file_name, str) for file_name in weight_map.values()
    ):
        raise InputError(f"{index}: 'weight_map' is not a map of names to files")
    return weight_map


class RandomWeights:
    """New weights, the same for a seed in every layout: each tensor is drawn from its own name.

    Normal with std `initializer_range`, output projections scaled by 1/sqrt(2 L) (GPT-2), norms 1.
    """

    def __init__(self, arch: ModelArchitecture, seed: int):
        self._arch, self._seed, self._shapes = arch, seed, hf_shapes(arch)

    def get(self, name: str) -> Tensor:
        """The full float32 tensor of a name."""
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        digest = hashlib.blake2b(f"{self._seed}/{name}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        std = self._arch.initializer_range
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * self._arch.num_layers)
        return torch.randn(shape, generator=generator) * std


def stop_token_ids(folder: Path, tokenizer_eos_id: int | None) -> tuple[int, ...]:
    """Tokens that end a completion of the model in `folder`.

    generation_config.json speaks first, then the tokenizer: config.json of some models names
    another token.
    """
    path = folder / "generation_config.json"
    if path.is_file():
        value = json.loads(path.read_text()).get("eos_token_id")
        if value is not None:
            return tuple(value) if isinstance(value, list) else (value,)
    return () if tokenizer_eos_id is None else (tokenizer_eos_id,)


def write_hf_folder(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    arch: ModelArchitecture,
    *,
    dtype: torch.dtype,
    source: Path,
    save_tokenizer: Callable[[Path], None],
    shard_bytes: int = 5 * 2**30,
) -> None:
    """Write a Hugging Face model folder; it replaces an older one only when it is whole.

    Args:
        folder: where it goes.
        tensors: (name, whole tensor) of everything in `hf_shapes(arch)`, in that order.
        arch: what is written.
        dtype: of the written tensors.
        source: folder whose config.json and generation_config.json are carried over.
        save_tokenizer: writes the tokenizer's files into a folder.
        shard_bytes: largest size of one safetensors file.

    Raises:
        RuntimeError: the tensors are not exactly those of the architecture.
    """
    shapes = hf_shapes(arch)
    plan = _plan_shards(shapes, dtype, shard_bytes)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    pending: dict[str, Tensor] = {}
    written: dict[str, str] = {}
    for name, tensor in tensors:
        if shapes.get(name) != tuple(tensor.shape) or name in written or name in pending:
            raise RuntimeError(f"export: unexpected tensor '{name}' {list(tensor.shape)}")
        pending[name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        file_name = plan[name]
        if all(n in pending for n, f in plan.items() if f == file_name):
            save_file(pending, partial / file_name, metadata={"format": "pt"})
            written.update(dict.fromkeys(pending, file_name))
            pending = {}
    missing = sorted(set(shapes) - set(written))
    if missing:
        raise RuntimeError(f"export: tensors missing: {missing}")
    if len(set(plan.values())) > 1:
        total = sum(math.prod(shape) * dtype.itemsize for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": written}
        (partial / _INDEX).write_text(json.dumps(index, indent=2))
    config = json.loads((source / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    if (source / "generation_config.json").is_file():
        shutil.copy(source / "generation_config.json", partial)
    save_tokenizer(partial)
    replaced = folder.with_name(folder.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _plan_shards(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, shard_bytes: int
) -> dict[str, str]:
    """Tensor name -> file name, filling files in order."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    if len(shards) == 1:
        return dict.fromkeys(shards[0], _SINGLE)
    return {
        name: f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        for i, names in enumerate(shards)
        for name in names
    }
