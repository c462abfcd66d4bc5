"""OLMo-core's checkpointer, with checksums, and reading that runs nothing."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from olmo_core import train
from olmo_core.distributed.checkpoint import async_save_state_dict
from olmo_core.distributed.utils import get_rank
from olmo_core.train.checkpoint import CheckpointMetadata
from olmo_core.train.train_module import TrainModule

from ultramem.hosts.olmo_core.checkpoint import MODEL_NAME, CheckpointFiles, CheckpointReader, write_checksums
from ultramem.training.processes import in_all

# OLMo-core's state of a run has NumPy's random state besides plain values and tensors.
_STATE_TYPES: list[Any] = [np.empty(0).__reduce__()[0], np.ndarray, np.dtype, np.dtypes.UInt32DType]


@dataclass
class CheckpointerConfig(train.CheckpointerConfig):
    """As in OLMo-core."""

    def build(self, process_group: dist.ProcessGroup | None = None, **options: Any) -> Checkpointer:
        """Build the checkpointer."""
        return Checkpointer(process_group=process_group, **self.as_dict(exclude_none=True, recurse=False) | options)


@dataclass
class Checkpointer(train.Checkpointer):
    """Writes and reads checkpoints of a run."""

    def save_async(
        self, dir: str, train_module: TrainModule, train_state: dict[str, Any], ephemeral: bool = False
    ) -> Future[None]:
        """As in OLMo-core; but if what follows the tensors cannot be written, the result is that error."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        with self._temporary_wd(dir) as unfinished:
            self._save_train_state(dir, unfinished, train_state)
        writing = async_save_state_dict(
            f"{dir}/{MODEL_NAME}",
            train_module.state_dict_to_save(),
            process_group=self.process_group,
            enable_plan_caching=True,
            _skip_prepare=True,
        )
        written: Future[None] = Future()

        def finish(tensors: Future[None]) -> None:
            try:
                tensors.result()
                self._save_metadata(dir, CheckpointMetadata(ephemeral=ephemeral))
            except BaseException as error:  # as PyTorch's is no Exception
                written.set_exception(error)
            else:
                written.set_result(None)

        writing.add_done_callback(finish)
        return written

    def _save_metadata(self, dir: str, metadata: CheckpointMetadata) -> None:
        if get_rank() == 0:  # all files are there, except for the one that completes the checkpoint
            write_checksums(Path(dir))
        super()._save_metadata(dir, metadata)

    def load(
        self,
        dir: str,
        train_module: TrainModule,
        *,
        load_trainer_state: bool | None = None,
        load_optim_state: bool | None = None,
        reset_optimizer_states_on_load: bool | None = None,
    ) -> dict[str, Any]:
        """Load a whole checkpoint that has been written by `save` or `save_async`; all processes together.

        Raises:
            UltraMemError: a file cannot be read; a `DamagedFileError` if it is damaged or holds more than data.
        """
        del load_trainer_state, reset_optimizer_states_on_load
        reader, state = in_all(lambda: (CheckpointReader(Path(dir)), read_trainer_state(Path(dir))))
        tensors = train_module.state_dict_to_load(reader.read_metadata(), optim=load_optim_state)
        reader.load(tensors, self.process_group)
        train_module.load_state_dict(tensors)
        return state


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Read the trainer's state in this process, or in the first one if there were fewer when it was written.

    Raises:
        UltraMemError: the file cannot be read; a `DamagedFileError` if it is damaged or holds more than data.
    """
    files, own = CheckpointFiles.open(checkpoint), f"train/rank{get_rank()}.pt"
    with torch.serialization.safe_globals(_STATE_TYPES):
        return files.load(own if files.has(own) else "train/rank0.pt")
