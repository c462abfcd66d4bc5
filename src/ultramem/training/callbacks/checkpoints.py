"""Checkpoints of a run."""

from __future__ import annotations

import concurrent.futures
import errno
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmo_core.train.callbacks import CheckpointerCallback
from olmo_core.train.callbacks.checkpointer import CheckpointRemovalStrategy
from torch.distributed.checkpoint.api import CheckpointException

from ultramem.errors import UltraMemError
from ultramem.training.callbacks.timing import timed_apart

_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO, errno.ESTALE)


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
        found = sorted(self.checkpointer.find_checkpoints(self.save_folder))
        self._checkpoints = [path for step, path in found if step <= self.step]

    def on_error(self, exc: BaseException) -> None:
        """Let a checkpoint that is being written be finished."""
        del exc
        if self._future is not None:
            concurrent.futures.wait([self._future])

    def _save_checkpoint(self, save_async: bool | None = None, ephemeral: bool = False) -> str:
        self._await_last_checkpoint()
        self._remove_old_checkpoints()
        directory = Path(self.save_folder) / self.checkpointer.checkpoint_dirname(self.step)
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
            cause = None if isinstance(error, UltraMemError) else _cause(error)
            if cause is None:
                raise
            for unfinished in (directory, directory.with_name(f"{directory.name}-tmp")):
                shutil.rmtree(unfinished, ignore_errors=True)
            raise UltraMemError(
                f"the checkpoint of {directory.name.replace('step', 'step ')} cannot be written to {directory} "
                f"({cause}); free some space and run the same command again"
            ) from error


def _cause(error: BaseException) -> str | None:
    """Why writing failed; None if the file system was not the cause.

    Found in the text of the error, as OLMo-core and PyTorch wrap the system's error in their own.
    """
    # PyTorch's writer does not give the reason; this is by far the most frequent one.
    unknown = os.strerror(errno.ENOSPC) if "PytorchStreamWriter" in str(error) else None
    return next((reason for reason in map(os.strerror, _WRITE_ERRORS) if reason in str(error)), unknown)
