"""Reading Hugging Face model folders, one tensor at a time.

safetensors first; a folder that has only pytorch_model*.bin is read by torch's weights-only loader,
which runs nothing that is in the file. A checkpoint is checked against the tensors that its config
asks for before anything is loaded. hf_writer.py is the other direction.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gdpo_megatron.conversion.architecture import ModelArchitecture, NoModel, read_json
from gdpo_megatron.conversion.checks import dtype_name, one_line, refuse
from gdpo_megatron.conversion.mapping import hf_shapes, mapping_rows
from gdpo_megatron.errors import InputError

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"

_BIN = "pytorch_model.bin"
_BIN_INDEX = "pytorch_model.bin.index.json"
# Buffers that old Llama checkpoints carry; everybody computes them from the config.
_COMPUTED = ".rotary_emb.inv_freq"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _dtype(name: str) -> torch.dtype | str:
    """Torch's dtype of a name in a safetensors header; the name where torch has none."""
    return _DTYPES.get(name, name)


Headers = dict[str, tuple[torch.dtype | str, tuple[int, ...]]]
"""(dtype, shape) of each tensor of a file; the name of a dtype that torch does not have."""


class WeightFile(Protocol):
    """One file of a checkpoint."""

    headers: Headers

    def get(self, name: str) -> Tensor: ...


class _Safetensors:
    def __init__(self, path: Path):
        self._path = path
        try:
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}
                self.headers: Headers = {
                    name: (_dtype(str(part.get_dtype())), tuple(part.get_shape()))
                    for name, part in slices.items()
                }
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: damaged file: {one_line(error)}") from error

    def get(self, name: str) -> Tensor:
        # Opened for each tensor: what stays open stays mapped, and the whole file with it.
        with safe_open(self._path, framework="pt") as file:
            return file.get_tensor(name)


class _TorchBin:
    def __init__(self, path: Path):
        try:
            # Files of old torch versions are no zip archives and cannot be mapped.
            tensors = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
        except Exception as error:  # torch raises half a dozen kinds, pickle's own among them
            reason = one_line(error)
            if "weights_only" in reason:
                reason = "it holds more than tensors, which is not loaded"
            raise InputError(f"{path}: damaged file: {reason}") from error
        if not isinstance(tensors, dict) or not all(
            isinstance(t, Tensor) for t in tensors.values()
        ):
            raise InputError(f"{path}: not a dictionary of tensors")
        self._tensors: dict[str, Tensor] = tensors
        self.headers: Headers = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}

    def get(self, name: str) -> Tensor:
        return self._tensors[name]


_KINDS: tuple[tuple[str, str, type[_Safetensors] | type[_TorchBin]], ...] = (
    (SAFETENSORS_INDEX, SAFETENSORS, _Safetensors),
    (_BIN_INDEX, _BIN, _TorchBin),
)


class HFCheckpoint:
    """The tensors of a Hugging Face folder, read on demand.

    Attributes:
        folder: where it is.
        dtypes: of each tensor of the architecture.

    Raises:
        InputError: no weights, a tensor missing, left over, or of the wrong shape.
    """

    def __init__(self, folder: Path, arch: ModelArchitecture):
        self.folder = folder
        self._open: dict[str, WeightFile] = {}
        self._files = self._locate()
        self.dtypes: dict[str, torch.dtype] = {}
        self._audit(arch)

    def _locate(self) -> dict[str, str]:
        """Tensor name -> file name within the folder."""
        for index_name, single, self._kind in _KINDS:
            index = self.folder / index_name
            self._index = index_name
            if index.is_file():
                return self._indexed(index)
            if (self.folder / single).is_file():
                return dict.fromkeys(self._file(single).headers, single)
        raise NoModel(f"{self.folder} holds no weights ({SAFETENSORS} or {SAFETENSORS_INDEX})")

    def _indexed(self, index: Path) -> dict[str, str]:
        weight_map = _read_weight_map(index)
        for file_name in sorted(set(weight_map.values())):
            if Path(file_name).name != file_name or "\\" in file_name:
                raise InputError(f"{index}: '{file_name}' points outside the folder")
            if not (self.folder / file_name).is_file():
                raise InputError(f"{index}: {file_name} is missing from the folder")
        return weight_map

    def _file(self, name: str) -> WeightFile:
        if name not in self._open:
            self._open[name] = self._kind(self.folder / name)
        return self._open[name]

    def _headers(self, file_name: str) -> Headers:
        return self._file(file_name).headers

    def _audit(self, arch: ModelArchitecture) -> None:
        expected = hf_shapes(arch)
        problems = [
            f"{self.folder}: tensor '{name}' is missing"
            for name in expected
            if name not in self._files
        ]
        for name, file_name in self._files.items():
            if name in expected:
                problems += self._tensor_problems(name, file_name, expected[name])
        # Those in the files too that an index does not name.
        held = {name for file in set(self._files.values()) for name in self._headers(file)}
        for name in dict.fromkeys([*self._files, *sorted(held)]):
            # The first is written by some tools although it is the embedding.
            tied_copy = name == "lm_head.weight" and arch.tie_word_embeddings
            if not (name in expected or tied_copy or name.endswith(_COMPUTED)):
                problems.append(f"{self.folder}: tensor '{name}' is not part of {arch.family}")
        refuse(problems, self.folder)

    def _tensor_problems(self, name: str, file_name: str, expected: tuple[int, ...]) -> list[str]:
        headers = self._headers(file_name)
        if name not in headers:
            return [f"{self.folder / self._index}: {file_name} does not hold tensor '{name}'"]
        dtype, shape = headers[name]
        if shape != expected:
            return [
                f"{self.folder}: tensor '{name}' has shape {list(shape)}, "
                f"config.json asks for {list(expected)}"
            ]
        if isinstance(dtype, str) or not dtype.is_floating_point or dtype.itemsize < 2:
            kind = dtype if isinstance(dtype, str) else dtype_name(dtype)
            return [
                f"{self.folder}: tensor '{name}' is {kind}; quantised checkpoints are not supported"
            ]
        self.dtypes[name] = dtype
        return []

    def get(self, name: str) -> Tensor:
        """The full tensor of a name, on the CPU, in the dtype of the file."""
        return self._file(self._files[name]).get(name)


def _read_weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(
        isinstance(file_name, str) for file_name in weight_map.values()
    ):
        raise InputError(f"{index}: 'weight_map' is not a map of names to files")
    return weight_map


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """A generator for one tensor: what is drawn depends on no other tensor and on no layout."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


class RandomWeights:
    """New weights, the same for a seed in every layout: each tensor is drawn from its own name.

    Normal with std `initializer_range`, output projections scaled by 1/sqrt(2 L) (GPT-2), norms 1,
    biases 0.
    """

    def __init__(self, arch: ModelArchitecture, seed: int):
        self._arch, self._seed, self._shapes = arch, seed, hf_shapes(arch)
        # What adds to the residual stream: the layers that TP cuts along their input.
        self._outputs = {
            name for row in mapping_rows(arch) if row.layout.tp_dim == 1 for name in row.hf
        }

    def get(self, name: str) -> Tensor:
        """The full float32 tensor of a name."""
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
        generator = seeded_generator(self._seed, name)
        std = self._arch.initializer_range
        if name in self._outputs:
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
