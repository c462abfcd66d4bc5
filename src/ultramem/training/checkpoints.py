"""Writing and loading the checkpoints of a run."""

from __future__ import annotations

import concurrent.futures
import errno
import os
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from olmo_core.distributed.utils import get_fs_local_rank, get_rank
from olmo_core.train import Trainer
from olmo_core.train.callbacks import Callback, CheckpointerCallback, SpeedMonitorCallback
from olmo_core.train.callbacks.checkpointer import CheckpointRemovalStrategy
from torch.distributed.checkpoint.api import CheckpointException

from ultramem.errors import UltraMemError, first_line
from ultramem.hosts.olmo_core import ModelConfig
from ultramem.hosts.olmo_core.checkpoint import check_stored_model
from ultramem.runs.checkpoints import checkpoint_name, complete_steps, others_in_checkpoint, remove_checkpoint
from ultramem.training.processes import in_all

_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO, errno.ESTALE)


@contextmanager
def timed_apart(callback: Callback) -> Iterator[None]:
    """Exclude the time inside from the reported speed of training."""
    yield
    for other in callback.trainer.callbacks.values():
        if isinstance(other, SpeedMonitorCallback):
            other.reset()


@dataclass
class Checkpoints(CheckpointerCallback):
    """Writes periodic checkpoints: after a failure never an incomplete one, and none of a run that has diverged."""

    def __post_init__(self) -> None:
        self.pre_train_checkpoint = False
        self.remove = CheckpointRemovalStrategy.never  # for ephemeral checkpoints, which are not used
        super().__post_init__()

    def post_checkpoint_loaded(self, path: Any) -> None:
        """Do not save again what was loaded."""
        self._latest_checkpoint_step, self._latest_checkpoint_path = self.step, str(path)

    def pre_train(self) -> None:
        """Count existing checkpoints among those to keep."""
        super().pre_train()
        run = Path(self.save_folder)
        self._checkpoints = [str(run / checkpoint_name(step)) for step in complete_steps(run) if step <= self.step]

    def _remove_checkpoint(self, path: str) -> None:
        if get_fs_local_rank() == 0 and not others_in_checkpoint(Path(path)):  # else a user keeps files there
            super()._remove_checkpoint(path)

    def on_error(self, exc: BaseException) -> None:
        """Let a checkpoint that is being written be finished."""
        del exc
        if self._future is not None:
            concurrent.futures.wait([self._future])

    def _save_checkpoint(self, save_async: bool | None = None, ephemeral: bool = False) -> str:
        self._await_last_checkpoint()
        self._remove_old_checkpoints()
        directory = Path(self.save_folder) / self.checkpointer.checkpoint_dirname(self.step)
        for place in filter(Path.exists, _places(directory) if get_rank() == 0 else ()):
            if others_in_checkpoint(place):
                raise UltraMemError(f"{place} is in the way of a checkpoint; rename it and run the same command again")
        with timed_apart(self), self._written(directory):
            if not (self.save_async if save_async is None else save_async):
                return super()._save_checkpoint(False, ephemeral)
            # Not by the trainer's method, whose metric of the duration belongs to another step in each process.
            self.trainer._log_metrics()  # raises an error if the run has diverged
            state = self.trainer.state_dict()
            self._future = self.checkpointer.save_async(str(directory), self.trainer.train_module, state, ephemeral)
            self._latest_checkpoint_step, self._latest_checkpoint_path = self.step, str(directory)
            return str(directory)

    def _await_last_checkpoint(self, blocking: bool = True) -> Future[None] | None:
        with self._written(Path(self._latest_checkpoint_path)):
            return super()._await_last_checkpoint(blocking)

    @contextmanager
    def _written(self, directory: Path) -> Iterator[None]:
        """Explain an error while a checkpoint is written, and remove what there is of it."""
        try:
            yield
        except (Exception, CheckpointException) as error:  # a CheckpointException is not an Exception
            # OLMo-core and PyTorch wrap the system's error in their own. PyTorch's writer hides the reason,
            # most often a full disk.
            unknown = os.strerror(errno.ENOSPC) if "PytorchStreamWriter" in str(error) else None
            cause = next((reason for reason in map(os.strerror, _WRITE_ERRORS) if reason in str(error)), unknown)
            if cause is None or isinstance(error, UltraMemError):
                raise
            for unfinished in filter(Path.exists, _places(directory)):
                with suppress(OSError):
                    remove_checkpoint(unfinished)
            raise UltraMemError(
                f"the checkpoint of {directory.name.replace('step', 'step ')} cannot be written to {directory} "
                f"({cause}); free some space and run the same command again"
            ) from error


def _places(checkpoint: Path) -> tuple[Path, Path]:
    """Where a checkpoint is, and where OLMo-core begins to write it."""
    return checkpoint, checkpoint.with_name(f"{checkpoint.name}-tmp")


def load_checkpoint(trainer: Trainer, checkpoint: Path, model: ModelConfig) -> None:
    """Load a checkpoint; all processes together, which raise the same error.

    Raises:
        UltraMemError: the model or the data differ, or a file cannot be read; a `DamagedFileError` if it is damaged or
            holds more than data.
    """
    in_all(lambda: check_stored_model(checkpoint, model))
    try:
        trainer.load_checkpoint(checkpoint, load_trainer_state=True, load_optim_state=True)
    except (UltraMemError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "fingerprint" in str(error):
            raise UltraMemError(
                f"the training data has changed since {checkpoint} was written; restore it, or start another run"
            ) from error
        raise UltraMemError(
            f"{checkpoint} cannot be loaded ({first_line(error)}); choose an earlier one with --from-checkpoint"
        ) from error
