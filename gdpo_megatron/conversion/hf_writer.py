"""Writing Hugging Face model folders: the trainer's export and the converter end here.

Tensors are asked for one by one in the order of the files and go straight to the disk, so that one
tensor is in memory and not one file. What has been written is checked on the disk against the
config, headers and sizes, before the folder gets its name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.conversion.checks import dtype_name, num_non_finite
from gdpo_megatron.conversion.hf_io import SAFETENSORS, SAFETENSORS_INDEX, HFCheckpoint
from gdpo_megatron.conversion.mapping import hf_shapes
from gdpo_megatron.conversion.model_folder import copy_model_config, model_files
from gdpo_megatron.conversion.output_folder import HashingStream, OutputFolder

SHARD_BYTES = 5 * 2**30
"""Largest size of one safetensors file, as Hugging Face has it by default."""

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Source(Protocol):
    """Where whole tensors come from, asked in layer order."""

    def get(self, name: str) -> Tensor: ...


class _InOrder:
    """A stream of (name, tensor) as a Source."""

    def __init__(self, tensors: Iterable[tuple[str, Tensor]], shapes: Mapping[str, Any]):
        self._tensors, self._shapes = iter(tensors), shapes

    def get(self, name: str) -> Tensor:
        given, tensor = next(self._tensors, (None, None))
        if tensor is None:
            raise RuntimeError(f"export: tensor '{name}' is missing")
        if given != name or tuple(tensor.shape) != self._shapes[name]:
            raise RuntimeError(
                f"export: unexpected tensor '{given}' {list(tensor.shape)}; "
                f"'{name}' {list(self._shapes[name])} is next"
            )
        return tensor

    def finish(self) -> None:
        for name, tensor in self._tensors:
            raise RuntimeError(f"export: unexpected tensor '{name}' {list(tensor.shape)}")


def write_hf_folder(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    arch: ModelArchitecture,
    *,
    dtype: torch.dtype,
    source: Path,
    save_tokenizer: Callable[[Path], None],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a Hugging Face model folder; it replaces an older one only when it is whole.

    Args:
        folder: where it goes.
        tensors: (name, whole tensor) of everything in `hf_shapes(arch)`, in that order.
        arch: what is written.
        dtype: of the written tensors.
        source: model folder whose config.json and generation_config.json are carried over.
        save_tokenizer: writes the tokenizer's files into a folder.
        shard_bytes: largest size of one safetensors file.

    Raises:
        RuntimeError: the tensors are not exactly those of the architecture.
        InputError: no space, or `folder` is something else than a model.
    """
    stream = _InOrder(tensors, hf_shapes(arch))
    with OutputFolder(folder, overwrite=True) as out:
        write_hf_weights(out, stream, arch, dtype=dtype, shard_bytes=shard_bytes)
        stream.finish()
        copy_model_config(model_files(source), out.path, dtype)
        save_tokenizer(out.path)
        audit_hf(out.path, arch, dtype)
        out.publish({"kind": "hf", "source": str(source), "dtype": dtype_name(dtype)})


def write_hf_weights(
    out: OutputFolder,
    source: Source,
    arch: ModelArchitecture,
    *,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
    on_bytes: Callable[[str, int], None] = lambda name, done: None,
) -> None:
    """Write the safetensors files and their index; finished files of an earlier attempt stay.

    Args:
        out: where to.
        source: of the tensors, asked in layer order.
        arch: what is written.
        dtype: of the written tensors.
        shard_bytes: largest size of one file; a larger tensor has a file of its own.
        on_bytes: called with (file, bytes of weights) for each tensor written.
    """
    shapes = hf_shapes(arch)
    plan = plan_shards(shapes, dtype, shard_bytes)
    for file_name, names in plan.items():
        sizes = {name: math.prod(shapes[name]) * dtype.itemsize for name in names}
        if out.finished(file_name):
            on_bytes(file_name, sum(sizes.values()))
            continue
        non_finite: dict[str, int] = {}
        with out.create(file_name, {"non_finite": non_finite}) as stream:
            _write_header(stream, {name: shapes[name] for name in names}, dtype)
            for name in names:
                tensor = source.get(name).detach().to("cpu", dtype).contiguous()
                if count := num_non_finite(tensor):
                    non_finite[name] = count
                stream.write(tensor.view(-1).view(torch.uint8).numpy())
                on_bytes(file_name, sizes[name])
    if len(plan) > 1:
        total = sum(math.prod(shape) * dtype.itemsize for shape in shapes.values())
        weight_map = {name: file_name for file_name, names in plan.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out.path / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n")


def plan_shards(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, shard_bytes: int
) -> dict[str, list[str]]:
    """File name -> its tensors, filling files in order."""
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
        return {SAFETENSORS: shards[0]}
    return {
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": names
        for i, names in enumerate(shards)
    }


def _write_header(
    stream: HashingStream, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> None:
    """The safetensors header: its length, then where each tensor lies behind it.

    The library itself writes a file from tensors that are all in memory; the format is its own.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin aligned
    stream.write(len(text).to_bytes(8, "little") + text)


def audit_hf(folder: Path, arch: ModelArchitecture, dtype: torch.dtype) -> None:
    """Check a written folder against its config: names, shapes, dtypes, bytes on the disk.

    Raises:
        InputError: names or shapes are wrong.
        RuntimeError: a dtype or the size of a file is.
    """
    checkpoint = HFCheckpoint(folder, arch)
    wrong = sorted(name for name, found in checkpoint.dtypes.items() if found != dtype)
    if wrong:
        raise RuntimeError(f"export: {folder}: {wrong[0]} is not {dtype_name(dtype)}")
    shapes = hf_shapes(arch)
    needed = sum(math.prod(shape) * dtype.itemsize for shape in shapes.values())
    written = sum(_tensor_bytes(path) for path in sorted(folder.glob("*.safetensors")))
    if written != needed:
        raise RuntimeError(
            f"export: {folder}: {written:,} bytes of weights on the disk; config.json and "
            f"{dtype_name(dtype)} ask for {needed:,}"
        )


def _tensor_bytes(path: Path) -> int:
    """Bytes of a safetensors file behind its header."""
    with path.open("rb") as stream:
        return path.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")


def hf_tensors(source: Source, arch: ModelArchitecture) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a checkpoint, in layer order."""
    for name in hf_shapes(arch):
        yield name, source.get(name)
