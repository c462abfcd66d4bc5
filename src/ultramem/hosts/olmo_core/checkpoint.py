"""Reading checkpoints of OLMo-core's trainer: nothing in them is run, and their checksums are compared."""

from __future__ import annotations

import io
import pickle
import warnings
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from olmo_core.distributed.checkpoint.filesystem import RemoteFileSystemReader
from torch import Tensor
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from ultramem.errors import UltraMemError, first_line, system_reason
from ultramem.files.checksums import CHECKSUMS_NAME, Checksums, DamagedFileError
from ultramem.hosts.olmo_core.config import ModelConfig
from ultramem.hosts.olmo_core.stored_metadata import parse_metadata

MODEL_NAME = "model_and_optim"
METADATA_NAME = f"{MODEL_NAME}/.metadata"


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of a checkpoint.

    Attributes:
        directory: the checkpoint's directory.
        checksums: of all its files; None for a checkpoint of version 0.1, whose files are read unchecked.
    """

    directory: Path
    checksums: Checksums | None

    @staticmethod
    def open(directory: Path) -> CheckpointFiles:
        """Read the checksums.

        Raises:
            UltraMemError: they cannot be read; a `DamagedFileError` if they are damaged.
        """
        return CheckpointFiles(directory, Checksums.load(directory))

    def has(self, name: str) -> bool:
        """Whether a file is or was there; names are paths in the directory."""
        return (self.directory / name).exists() or (self.checksums is not None and name in self.checksums.files)

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Read a file, or a piece that has a checksum of its own.

        Raises:
            UltraMemError: the file cannot be read; a `DamagedFileError` if it is missing or damaged.
        """
        path = self.directory / name
        try:
            if not path.is_file():
                raise DamagedFileError(f"{path} is missing")
            size = path.stat().st_size
            length = size if length is None else length
            if offset + length > size:
                raise DamagedFileError(f"{path} is damaged: it has {size} bytes, not {offset + length}")
            with path.open("rb") as file:
                file.seek(offset)
                content = file.read(length)
        except OSError as error:
            raise UltraMemError(f"{path} cannot be read ({system_reason(error)}); check its permissions") from error
        if self.checksums is not None:
            self.checksums.check_piece(name, offset, content)
        return content

    def load(self, name: str, offset: int = 0, length: int | None = None) -> Any:
        """Read what `torch.save` wrote: tensors, plain values, and types that are safe globals of PyTorch.

        Raises:
            UltraMemError: as in `read`; a `DamagedFileError` also if it holds other things.
        """
        content = self.read(name, offset, length)
        try:
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise DamagedFileError(
                f"{self.directory / name} is damaged: it holds more than tensors and plain values, which is not loaded"
            ) from error
        except MemoryError:
            raise
        except Exception as error:
            raise DamagedFileError(f"{self.directory / name} is damaged ({first_line(error)})") from error


class CheckpointReader(RemoteFileSystemReader):
    """Reads the model and the optimizer of a checkpoint.

    Args:
        checkpoint: the checkpoint's directory.

    Raises:
        UltraMemError: the metadata cannot be read; a `DamagedFileError` if they are damaged or hold more than data.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint / MODEL_NAME)
        self._files = CheckpointFiles.open(checkpoint)
        content = self._files.read(METADATA_NAME)
        try:
            self._parsed = parse_metadata(content)
        except Exception as error:
            raise DamagedFileError(f"{checkpoint / METADATA_NAME} is damaged ({first_line(error)})") from error

    def read_metadata(self) -> Metadata:
        """Names, shapes and places."""
        return self._parsed

    @torch.no_grad()
    def load(self, state: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
        """Load into the tensors of `state`; all processes together.

        Args:
            state: tensors and other values by name, in nested dictionaries; what is no tensor is replaced.
            group: the processes; by default all.

        Raises:
            UltraMemError: a file cannot be read; a `DamagedFileError` if it is damaged or holds more than data.
        """
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
                warnings.filterwarnings("ignore", "Detected pickle protocol")
                load(state, storage_reader=self, planner=_Planner(), process_group=group)
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            if isinstance(cause, UltraMemError | MemoryError | torch.OutOfMemoryError):
                raise cause from error
            raise UltraMemError(f"{self.path} cannot be loaded ({first_line(cause)})") from error

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        """Read, check and load items; called by PyTorch."""
        for item, value in self._values(plan.items):
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, value)
                continue
            part = [slice(start, start + size) for start, size in zip(item.storage_offsets, item.lengths, strict=True)]
            target = planner.resolve_tensor(item).detach()
            if value.dim() != len(part) or value[tuple(part)].shape != target.shape:
                raise DamagedFileError(f"{self.path} is damaged: {item.storage_index.fqn} has another shape")
            target.copy_(value[tuple(part)])
            planner.commit_tensor(item, target)
        done: torch.futures.Future[None] = torch.futures.Future()
        done.set_result(None)
        return done

    def _values(self, items: Sequence[ReadItem]) -> Iterator[tuple[ReadItem, Any]]:
        """Items and what is stored, read in threads, which are ahead by a few items."""
        waiting: deque[tuple[ReadItem, Future[Any]]] = deque()
        with ThreadPoolExecutor(self.thread_count) as threads:
            for item in items:
                waiting.append((item, threads.submit(self._value, item)))
                if len(waiting) > self.thread_count:
                    earlier, value = waiting.popleft()
                    yield earlier, value.result()
            for earlier, value in waiting:
                yield earlier, value.result()

    def _value(self, item: ReadItem) -> Any:
        place = self.storage_data[item.storage_index]
        name = f"{MODEL_NAME}/{place.relative_path}"
        value = self._files.load(name, place.offset, place.length)
        if item.type != LoadItemType.BYTE_IO and not isinstance(value, Tensor):
            raise DamagedFileError(f"{self._files.directory / name} is damaged: it lacks a tensor")
        return value


class _Planner(DefaultLoadPlanner):
    """PyTorch's, except for what is no tensor, which `CheckpointReader` has loaded already."""

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], value)


def check_stored_model(checkpoint: Path, config: ModelConfig) -> None:
    """Compare names and shapes in a checkpoint with those of the model that `config` describes.

    Args:
        checkpoint: directory of a checkpoint of OLMo-core's trainer.
        config: configuration of the model.

    Raises:
        UltraMemError: they differ, or the metadata cannot be read; a `DamagedFileError` if they are damaged.
    """
    stored = CheckpointReader(checkpoint).read_metadata().state_dict_metadata
    model_part = {name.removeprefix("model."): entry for name, entry in stored.items() if name.startswith("model.")}
    shapes = {name: getattr(entry, "size", ()) for name, entry in model_part.items()}
    difference = _first_difference(config.build("meta").state_dict(), shapes)
    if difference:
        raise UltraMemError(
            f"{checkpoint / MODEL_NAME} does not fit the run's configuration: {difference}; restore the configuration "
            "of its training"
        )


def write_checksums(checkpoint: Path) -> None:
    """Write the checksums of a checkpoint's files: of each item that is read by itself, and of other files as wholes.

    Raises:
        OSError: a file cannot be read or written.
    """
    items = parse_metadata((checkpoint / METADATA_NAME).read_bytes()).storage_data.values()
    pieces: defaultdict[str, list[int]] = defaultdict(list)
    for place in sorted(items, key=lambda place: place.offset):
        pieces[f"{MODEL_NAME}/{place.relative_path}"].append(place.length)
    paths = [path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()]
    Checksums.compute(checkpoint, [path for path in paths if path != CHECKSUMS_NAME], pieces).save()


def _first_difference(expected: dict[str, Tensor], stored: dict[str, tuple[int, ...]]) -> str | None:
    for name, tensor in expected.items():
        if name not in stored:
            return f"it lacks {name}"
        if tensor.shape != stored[name]:
            return f"{name} has the shape {tuple(stored[name])}, not {tuple(tensor.shape)}"
    surplus = stored.keys() - expected.keys()
    return f"it also has {min(surplus)}" if surplus else None
