"""The `.metadata` file of torch.distributed.checkpoint, read without running what is in it.

The file is a pickle, which torch reads with pickle's own loader; a checkpoint from somebody else
could then run any code. Here only the records that a checkpoint is described by are created;
anything else that the file names is refused.
"""

from __future__ import annotations

import pathlib
from collections import OrderedDict
from pathlib import Path
from pickle import Unpickler, UnpicklingError
from typing import Any

import torch
import torch.serialization
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import Metadata

from gdpo_megatron.conversion.checks import one_line
from gdpo_megatron.errors import InputError

_RECORDS: tuple[Any, ...] = (
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata.TensorStorageMetadata,
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.TensorProperties,
    metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
    filesystem._StoragePrefix,
    planner.SavePlan,
    planner.WriteItem,
    planner.WriteItemType,
    planner.TensorWriteData,
    planner.BytesIOWriteData,
    torch.Size,
    torch.serialization._get_layout,
    OrderedDict,
    pathlib.PosixPath,
)
_ALLOWED: dict[tuple[str, str], Any] = {(it.__module__, it.__qualname__): it for it in _RECORDS}
# Where other Python and Megatron versions have them.
_ALLOWED |= {
    ("pathlib._local", "PosixPath"): pathlib.PosixPath,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): Metadata,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): planner.SavePlan,
}


class _RecordsOnly(Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in _ALLOWED:
            raise UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return _ALLOWED[module, name]


def read_metadata(path: Path) -> Metadata:
    """Read a `.metadata` file.

    Raises:
        InputError: it is damaged, or names anything but the records of a checkpoint.
    """
    try:
        with path.open("rb") as stream:
            found = _RecordsOnly(stream).load()
    except Exception as error:  # a damaged pickle can raise nearly everything
        raise InputError(f"{path}: damaged file: {one_line(error)}") from error
    if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
        raise InputError(f"{path}: damaged file: no metadata of a checkpoint")
    return found
