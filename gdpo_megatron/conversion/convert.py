"""One pipeline for all conversions: a reader, whole tensors in layer order, a writer.

Hugging Face and Megatron each have a reader and a writer, so the way between the formats is the
same code as another shard size or dtype within one. A tensor is read when it is its turn to be
written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.conversion.checks import DTYPES, dtype_name
from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.hf_writer import (
    SHARD_BYTES,
    audit_hf,
    plan_shards,
    write_hf_weights,
)
from gdpo_megatron.conversion.mapping import hf_shapes
from gdpo_megatron.conversion.megatron_io import (
    MegatronCheckpoint,
    plan_files,
    write_megatron_weights,
)
from gdpo_megatron.conversion.megatron_keys import num_parameters
from gdpo_megatron.conversion.model_folder import (
    HF_FILES,
    Checkpoint,
    copy_model_files,
    model_files,
    open_checkpoint,
    uniform_dtype,
)
from gdpo_megatron.conversion.output_folder import OutputFolder, check_target
from gdpo_megatron.errors import InputError

Format = Literal["hf", "megatron"]

# Headers, metadata, tokenizer and the zip around every tensor of a distributed checkpoint.
_BESIDE_WEIGHTS = 32 * 2**20


class Progress(Protocol):
    """What is told how far a conversion is."""

    def begin(self, num_bytes: int, num_files: int) -> None:
        """Bytes of weights that there are in all, and files of them."""
        ...

    def advance(self, file: str, num_bytes: int) -> None:
        """Bytes of weights that have been written to a file, or were there from before."""
        ...

    def message(self, text: str) -> None:
        """Something that a person should know."""
        ...


class _Silent:
    def begin(self, num_bytes: int, num_files: int) -> None: ...
    def advance(self, file: str, num_bytes: int) -> None: ...
    def message(self, text: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What a conversion did.

    Args:
        target: the new folder.
        arch: of the model.
        manifest: as written.
        non_finite: tensor -> how many of its values are NaN or infinite.
    """

    target: Path
    arch: ModelArchitecture
    manifest: dict[str, Any]
    non_finite: dict[str, int] = field(default_factory=dict[str, int])


def convert(
    source: Path,
    target: Path,
    *,
    to: Format,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    hf_files: Path | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Write a model folder anew, in one of the two formats.

    Args:
        source: model folder of either format, a run's checkpoint among them.
        target: folder that is to be; written as <target>.partial until it is whole.
        to: the format of the target.
        dtype: of the written tensors; None keeps the source's.
        shard_bytes: largest size of one file.
        overwrite: replace a model folder that is there.
        hf_files: Hugging Face folder with config.json and tokenizer, for a Megatron checkpoint
            that carries none, or in place of those that it carries.
        progress: is told how far it is.

    Raises:
        InputError: the source is damaged or unknown, the target exists, or there is no space.
    """
    progress = progress or _Silent()
    source, target = source.absolute(), target.absolute()
    check_target(target, overwrite=overwrite)
    _check_apart(source, target)
    files = hf_files or model_files(source)
    arch = load_architecture(files)
    checkpoint = open_checkpoint(source, arch)
    out_dtype = _output_dtype(checkpoint, dtype)
    resume_key = {
        "source": _content(source),
        "files": _content(files),
        "to": to,
        "dtype": dtype_name(out_dtype),
        "shard_bytes": shard_bytes,
    }
    num_bytes = num_parameters(arch) * out_dtype.itemsize
    with OutputFolder(target, overwrite=overwrite, resume_key=resume_key) as out:
        for text in out.messages:
            progress.message(text)
        out.require_space(num_bytes + _BESIDE_WEIGHTS)
        num_files, write = _WRITERS[to]
        progress.begin(num_bytes, num_files(arch, out_dtype, shard_bytes))
        write(out, checkpoint, arch, files, out_dtype, shard_bytes, progress.advance)
        non_finite = out.collected("non_finite")
        for name, count in non_finite.items():
            progress.message(f"warning: {name}: {count:,} values are not finite")
        about: dict[str, Any] = {
            "kind": to,
            "source": str(source),
            "dtype": dtype_name(out_dtype),
            "family": arch.family,
            "num_parameters": num_parameters(arch),
        }
        if non_finite:
            about["non_finite"] = non_finite
        manifest = out.publish(about)
    return Converted(target=target, arch=arch, manifest=manifest, non_finite=non_finite)


def _write_hf(
    out: OutputFolder,
    checkpoint: Checkpoint,
    arch: ModelArchitecture,
    files: Path,
    dtype: torch.dtype,
    shard_bytes: int,
    on_bytes: Callable[[str, int], None],
) -> None:
    write_hf_weights(out, checkpoint, arch, dtype=dtype, shard_bytes=shard_bytes, on_bytes=on_bytes)
    copy_model_files(files, out.path, dtype)
    audit_hf(out.path, arch, dtype)


def _write_megatron(
    out: OutputFolder,
    checkpoint: Checkpoint,
    arch: ModelArchitecture,
    files: Path,
    dtype: torch.dtype,
    shard_bytes: int,
    on_bytes: Callable[[str, int], None],
) -> None:
    write_megatron_weights(
        out, checkpoint, arch, dtype=dtype, shard_bytes=shard_bytes, on_bytes=on_bytes
    )
    (out.path / HF_FILES).mkdir()
    copy_model_files(files, out.path / HF_FILES, dtype)
    MegatronCheckpoint(out.path, arch)  # audits what is on the disk


_WRITERS = {
    "hf": (lambda arch, dtype, size: len(plan_shards(hf_shapes(arch), dtype, size)), _write_hf),
    "megatron": (lambda arch, dtype, size: len(plan_files(arch, dtype, size)), _write_megatron),
}


def _output_dtype(checkpoint: Checkpoint, name: str | None) -> torch.dtype:
    if name is None:
        return uniform_dtype(checkpoint)
    if name not in DTYPES:
        raise InputError(f"--dtype is '{name}'; choices: {', '.join(DTYPES)}")
    return DTYPES[name]


def _check_apart(source: Path, target: Path) -> None:
    one, other = source.resolve(), target.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise InputError(f"{target}: lies within {source} or around it; give a folder beside it")


def _content(folder: Path) -> list[Any]:
    """What tells one content of a folder from another without reading it."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    stats = [(path.name, path.stat()) for path in paths]
    return [str(folder.resolve()), [[name, s.st_size, s.st_mtime_ns] for name, s in stats]]
