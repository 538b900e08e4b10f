"""Reading and writing Megatron's distributed checkpoints (torch_dist), one row at a time.

No Megatron model, process group or device takes part: megatron_keys.py says where a row of the
mapping lies, torch.distributed.checkpoint's own reader and writer move the bytes. Since these
checkpoints know no layout, one reader takes what any TP, PP, EP or VPP has saved (optimizer state
beside the weights is left alone), and what is written here loads into any.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.filesystem import (
    FileSystem,
    FileSystemReader,
    FileSystemWriter,
    _StorageInfo,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.conversion.checks import num_non_finite, one_line, refuse
from gdpo_megatron.conversion.megatron_keys import (
    Place,
    StoredRow,
    extra_state_keys,
    stored_rows,
)
from gdpo_megatron.conversion.megatron_metadata import read_metadata
from gdpo_megatron.conversion.output_folder import HashingStream, OutputFolder
from gdpo_megatron.errors import InputError

MEGATRON_METADATA = ".metadata"

_CONFIG = "metadata.json"
_COMMON = "common.pt"
# What megatron-core's loader reads first: the kinds of storage of tensors and of everything else.
_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_ADAPTERS = "layers.lora."  # where policy/lora.py puts them
_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")


# ---- reading -------------------------------------------------------------------------------------


class _IntoTensor(DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, target: Tensor):
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self._target
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It is in place already."""


class MegatronCheckpoint:
    """The weights of a distributed checkpoint under their Hugging Face names, read on demand.

    Attributes:
        folder: where it is.
        dtypes: of each Hugging Face tensor.

    Raises:
        InputError: damaged, or not exactly the parameters of the architecture.
    """

    def __init__(self, folder: Path, arch: ModelArchitecture):
        self.folder, self._arch = folder, arch
        _check_backend(folder)
        self._metadata = read_metadata(folder / MEGATRON_METADATA)
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._chunks: dict[str, dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}
        self._rows: dict[str, tuple[StoredRow, tuple[Place, ...]]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._audit()
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._last: dict[str, Tensor] = {}

    def get(self, name: str) -> Tensor:
        """The full tensor of a Hugging Face name, on the CPU, in the dtype of the checkpoint."""
        if name not in self._last:
            self._last = {}  # before the next row is read: only one is in memory
            stored, places = self._rows[name]
            parts = stored.row.layout.split(self._read(stored, places), self._arch)
            self._last = dict(zip(stored.row.hf, parts, strict=True))
        return self._last[name]

    def _read(self, stored: StoredRow, places: tuple[Place, ...]) -> Tensor:
        """The full Megatron tensor of a row, without a vocabulary's padding beyond the saver's."""
        shape = stored.shape
        if stored.padded:  # what is behind the vocabulary differs between layouts; it is not used
            shape = (min(shape[0], self._tensors[places[0].key].size[0]), *shape[1:])
        target = torch.empty(shape, dtype=self._tensors[places[0].key].properties.dtype)
        for place, part in zip(places, target.chunk(len(places)), strict=True):
            self._read_into(part, place)
        return target

    def _read_into(self, target: Tensor, place: Place) -> None:
        entry = self._tensors[place.key]
        wanted = ChunkStorageMetadata(
            offsets=torch.Size(place.index + (0,) * target.ndim),
            sizes=torch.Size((1,) * len(place.stack) + tuple(target.shape)),
        )
        near = TensorStorageMetadata(entry.properties, entry.size, self._chunks_near(place))
        plan = LoadPlan(create_read_items_for_chunk_list(place.key, near, [wanted]))
        try:
            self._reader.read_data(plan, _IntoTensor(target.view(wanted.sizes))).wait()
        except Exception as error:  # zip, pickle and file errors of a damaged file
            # What torch says of such a file is long, and advice that must not be followed.
            reason = one_line(error) if isinstance(error, OSError) else "its bytes are damaged"
            raise InputError(
                f"{self.folder}: '{_shown(place)}' cannot be read: {reason}"
            ) from error

    def _chunks_near(self, place: Place) -> list[ChunkStorageMetadata]:
        """The chunks of one slice, and those that span several."""
        depth = len(place.index)
        if place.key not in self._chunks:
            by_slice: dict[tuple[int, ...], list[ChunkStorageMetadata]] = {}
            for chunk in self._tensors[place.key].chunks:
                single = all(size == 1 for size in chunk.sizes[:depth])
                by_slice.setdefault(tuple(chunk.offsets[:depth]) if single else (-1,), []).append(
                    chunk
                )
            self._chunks[place.key] = by_slice
        by_slice = self._chunks[place.key]
        return by_slice.get(place.index, []) + (by_slice.get((-1,), []) if depth else [])

    # ---- checks ----------------------------------------------------------------------------------

    def _audit(self) -> None:
        problems: list[str] = []
        used: set[str] = set()
        if adapters := [key for key in self._tensors if _ADAPTERS in key]:
            own = self.folder.parent
            run_dir = own.parent if own.name == "checkpoints" else Path("<run_dir>")
            raise InputError(
                f"{self.folder}: has LoRA adapters ('{adapters[0]}'), which are not converted; use "
                f"the run's hf folder, {run_dir / 'hf'}, which has them merged (written at the end "
                "of the run, with checkpoint.export_hf)"
            )
        for stored in stored_rows(self._arch):
            choices = [(place,) for place in stored.places] + list(stored.alternatives)
            places = next((c for c in choices if all(p.key in self._tensors for p in c)), None)
            if places is None:
                problems.append(f"{self.folder}: parameter '{_shown(stored.places[0])}' is missing")
                continue
            used.update(place.key for place in (*stored.places, *places))
            problems += self._shape_problems(stored, places)
            for name in stored.row.hf:
                self._rows[name] = stored, places
                self.dtypes[name] = self._tensors[places[0].key].properties.dtype
        problems += [
            f"{self.folder}: parameter '{key}' is not part of {self._arch.family}"
            for key in self._tensors
            if key.startswith(_MODEL_KEYS) and key not in used
        ]
        if not problems:
            problems += self._damage(used & set(self._tensors))
        refuse(list(dict.fromkeys(problems)), self.folder)

    def _shape_problems(self, stored: StoredRow, places: tuple[Place, ...]) -> Iterator[str]:
        first, *rest = stored.shape
        for place in places:
            found = tuple(self._tensors[place.key].size)
            expected = (*place.stack, first // len(places), *rest)
            enough = stored.padded and len(found) == len(expected)
            if enough and found[0] >= self._arch.vocab_size and found[1:] == expected[1:]:
                continue
            if found != expected:
                yield (
                    f"{self.folder}: parameter '{place.key}' has shape {list(found)}, "
                    f"config.json asks for {list(expected)}"
                )

    def _damage(self, keys: set[str]) -> Iterator[str]:
        """Chunks that are missing or lie beyond the end of their file."""
        sizes: dict[str, int] = {}
        for key in sorted(keys):
            entry = self._tensors[key]
            if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
                yield f"{self.folder}: parameter '{key}' is not whole"
            for chunk in entry.chunks:
                info = self._metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
                if info is None:
                    yield f"{self.folder}: parameter '{key}' is not whole"
                    break
                name = info.relative_path
                if Path(name).name != name:
                    yield f"{self.folder / MEGATRON_METADATA}: '{name}' points outside the folder"
                    return
                if name not in sizes:
                    path = self.folder / name
                    sizes[name] = path.stat().st_size if path.is_file() else -1
                if sizes[name] < info.offset + info.length:
                    what = "is missing" if sizes[name] < 0 else "damaged file: its end is missing"
                    yield f"{self.folder / name}: {what}"
                    sizes[name] = info.offset + info.length + 2**62  # told once


def _shown(place: Place) -> str:
    return place.key + (f" {list(place.index)}" if place.index else "")


def _check_backend(folder: Path) -> None:
    try:
        backend = json.loads((folder / _CONFIG).read_text())["sharded_backend"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{folder}: no Megatron checkpoint: {_CONFIG} is missing or damaged"
        ) from error
    if backend != _BACKENDS["sharded_backend"]:
        raise InputError(f"{folder}: format '{backend}' is not supported; choices: torch_dist")


# ---- writing -------------------------------------------------------------------------------------


class Source(Protocol):
    """Where whole Hugging Face tensors come from."""

    def get(self, name: str) -> Tensor: ...


class _LazyPlanner(DefaultSavePlanner):
    """Reads and merges a row when its turn to be written has come."""

    def __init__(
        self,
        rows: Mapping[MetadataIndex, tuple[StoredRow, Place]],
        source: Source,
        arch: ModelArchitecture,
        dtype: torch.dtype,
        on_row: Callable[[StoredRow, Tensor], None],
    ):
        super().__init__()
        self._rows, self._source, self._arch, self._dtype = rows, source, arch, dtype
        self._on_row = on_row

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return _no_extra_state()
        stored, place = self._rows[write_item.index]
        row = stored.row
        parts = [self._source.get(name).to(self._dtype) for name in row.hf]
        full = row.layout.merge(parts, self._arch, 1)
        self._on_row(stored, full)
        return full.reshape((1,) * len(place.stack) + stored.shape)


def _no_extra_state() -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save([None], buffer)
    return buffer


class _IntoStream(FileSystem):
    """torch's file access, with a stream that is open already in place of a new file."""

    def __init__(self, stream: HashingStream):
        self._stream = stream

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        yield self._stream


def write_megatron_weights(
    out: OutputFolder,
    source: Source,
    arch: ModelArchitecture,
    *,
    dtype: torch.dtype,
    shard_bytes: int,
    on_bytes: Callable[[str, int], None] = lambda name, done: None,
) -> None:
    """Write a distributed checkpoint; finished files of an earlier attempt stay.

    Args:
        out: where to.
        source: of whole Hugging Face tensors, asked in layer order.
        arch: what is written.
        dtype: of the written tensors.
        shard_bytes: largest size of one file; a larger row has a file of its own.
        on_bytes: called with (file, bytes of weights) for each row written.
    """
    groups = plan_files(arch, dtype, shard_bytes)
    rows = {
        _index(place, stored): (stored, place)
        for group in groups
        for stored in group
        for place in stored.places
    }
    plans = [
        SavePlan([_write_item(p, s, dtype) for s in group for p in s.places]) for group in groups
    ]
    plans[-1].items.extend(
        WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in extra_state_keys(arch)
    )
    plans, metadata = create_default_global_save_plan(plans)
    # No copying ahead: on a machine with a GPU torch would hold several rows.
    writer = FileSystemWriter(out.path, sync_files=False, per_thread_copy_ahead=0)
    results: list[list[WriteResult]] = []
    for plan, group in zip(writer.prepare_global_plan(plans), groups, strict=True):
        name = f"__{len(results)}_0.distcp"  # the writer calls it so, as a rank's first file
        record = out.finished(name)
        if record is not None:
            on_bytes(name, sum(stored.num_parameters for stored in group) * dtype.itemsize)
            results.append([_from_json(item, name) for item in record["items"]])
            continue
        extra: dict[str, Any] = {"non_finite": {}, "items": []}

        def on_row(
            stored: StoredRow, full: Tensor, name: str = name, extra: dict[str, Any] = extra
        ) -> None:
            if count := num_non_finite(full):
                extra["non_finite"][", ".join(stored.row.hf)] = count
            on_bytes(name, stored.num_parameters * dtype.itemsize)

        with out.create(name, extra) as stream:
            writer.fs = _IntoStream(stream)
            written = writer.write_data(plan, _LazyPlanner(rows, source, arch, dtype, on_row))
            results.append(list(written.wait()))
            extra["items"] += [_as_json(result) for result in results[-1]]
    writer.fs = FileSystem()
    writer.finish(metadata, results)
    (out.path / _CONFIG).write_text(json.dumps(_BACKENDS))
    torch.save({}, out.path / _COMMON)


def plan_files(
    arch: ModelArchitecture, dtype: torch.dtype, shard_bytes: int
) -> list[list[StoredRow]]:
    """The rows of each file, filling files in order.

    torch's writer keeps the last tensor of every key in memory until a file is done. So the
    embedding, which is large and the only one of its key, has a file of its own.
    """
    groups: list[list[StoredRow]] = []
    used = 0
    for stored in stored_rows(arch):
        size = _num_bytes(stored, dtype)
        previous = groups[-1][-1] if groups else None
        alone = previous is None or previous.padded or stored.padded
        if alone or used + size > shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(stored)
        used += size
    return groups


def _num_bytes(stored: StoredRow, dtype: torch.dtype) -> int:
    return math.prod(stored.shape) * dtype.itemsize


def _index(place: Place, stored: StoredRow) -> MetadataIndex:
    return MetadataIndex(place.key, torch.Size(place.index + (0,) * len(stored.shape)))


def _write_item(place: Place, stored: StoredRow, dtype: torch.dtype) -> WriteItem:
    index = _index(place, stored)
    assert index.offset is not None
    sizes = torch.Size((1,) * len(place.stack) + stored.shape)
    return WriteItem(
        index,
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(index.offset, sizes),
            properties=TensorProperties(dtype=dtype),
            size=torch.Size(place.stack + stored.shape),
        ),
    )


def _as_json(result: WriteResult) -> list[Any]:
    """What the journal keeps of a written item: (key, offset in the tensor, place in the file)."""
    offset = None if result.index.offset is None else list(result.index.offset)
    info = result.storage_data
    return [result.index.fqn, offset, result.index.index, info.offset, info.length]


def _from_json(item: list[Any], name: str) -> WriteResult:
    key, offset, number, start, length = item
    index = MetadataIndex(key, None if offset is None else torch.Size(offset), number)
    return WriteResult(index, length, _StorageInfo(name, start, length))
