"""The metadata of PyTorch's distributed checkpoints: a pickle, read as data."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import torch
from olmo_core.distributed.checkpoint import filesystem as olmo_core_filesystem
from torch.distributed.checkpoint import filesystem as torch_filesystem
from torch.distributed.checkpoint import metadata as stored
from torch.distributed.checkpoint.metadata import Metadata

_TYPES = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        stored.BytesStorageMetadata,
        stored.ChunkStorageMetadata,
        stored.Metadata,
        stored.MetadataIndex,
        stored.StorageMeta,
        stored.TensorProperties,
        stored.TensorStorageMetadata,
        stored._MEM_FORMAT_ENCODING,
        olmo_core_filesystem._StorageInfo,
        torch_filesystem._StorageInfo,
        torch.Size,
    )
}


def parse_metadata(content: bytes) -> Metadata:
    """Read the content of a file `.metadata` without running anything that it names.

    Raises:
        Exception: it names something that is not data, its files lie elsewhere, or it cannot be understood.
    """
    metadata = _Unpickler(io.BytesIO(content)).load()
    if not isinstance(metadata, Metadata):
        raise ValueError("it is not the metadata of a checkpoint")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(getattr(entry, "size", torch.Size()), torch.Size):
            raise ValueError(f"{name!r} is not described as a tensor or a value")
    for place in metadata.storage_data.values():
        name = place.relative_path
        if PurePosixPath(name).name != name or "\0" in name:
            raise ValueError(f"it names a file elsewhere, {name!r}")
        for number in (place.offset, place.length):
            if type(number) is not int or not 0 <= number < 2**63:
                raise ValueError(f"{number!r} is no place in a file")
    return metadata


class _Unpickler(pickle.Unpickler):
    """Knows the types of which metadata consists, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Look up an exact name."""
        dtype = vars(torch).get(name)
        if module == "torch" and isinstance(dtype, torch.dtype):
            return dtype
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _stand_in(torch.serialization._get_layout)
        if module in ("pathlib", "pathlib._local") and name == "PosixPath":  # in what PyTorch's own writer wrote
            return _stand_in(PurePosixPath)
        if (module, name) not in _TYPES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not data")
        kind = _TYPES[module, name]
        return _stand_in(lambda *arguments: kind.__new__(kind, *arguments))


def _stand_in(make: Callable[..., Any]) -> type:
    """A class that makes something else: a pickle can set attributes of what it names, which has no effect here."""
    return type("_StandIn", (), {"__new__": lambda _, *arguments: make(*arguments)})
