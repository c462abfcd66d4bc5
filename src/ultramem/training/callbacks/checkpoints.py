"""Checkpoints of a run: when they are written, and what is left where one cannot be."""

from __future__ import annotations

import errno
import os
import shutil
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
    """Periodic checkpoints, which a failure never leaves half written, and none of a run that has diverged."""

    def __post_init__(self) -> None:
        self.save_async, self.pre_train_checkpoint = False, False
        self.remove = CheckpointRemovalStrategy.never  # of ephemeral checkpoints, of which there are none
        super().__post_init__()

    def post_checkpoint_loaded(self, path: Any) -> None:
        """What was loaded need not be saved again."""
        self._latest_checkpoint_step, self._latest_checkpoint_path = self.step, str(path)

    def pre_train(self) -> None:
        """Count the checkpoints that are there among those to keep."""
        super().pre_train()
        found = sorted(self.checkpointer.find_checkpoints(self.save_folder))
        self._checkpoints = [path for step, path in found if step <= self.step]

    def _save_checkpoint(self, save_async: bool | None = None, ephemeral: bool = False) -> str:
        try:
            with timed_apart(self):
                return super()._save_checkpoint(save_async, ephemeral)
        except (Exception, CheckpointException) as error:  # the latter is none of the former
            cause = _cause(error)
            if cause is None:
                raise
            directory = Path(self.save_folder) / self.checkpointer.checkpoint_dirname(self.step)
            for unfinished in (directory, directory.with_name(f"{directory.name}-tmp")):
                shutil.rmtree(unfinished, ignore_errors=True)
            raise UltraMemError(
                f"the checkpoint of step {self.step} cannot be written to {directory}: {cause}: make room and run the "
                "same command again"
            ) from error


def _cause(error: BaseException) -> str | None:
    """Why writing failed, in a few words; None if not by the file system.

    From the text, since OLMo-core and PyTorch wrap the system's error in errors of their own.
    """
    # PyTorch's writer does not tell the reason, of which this is by far the most frequent.
    unknown = os.strerror(errno.ENOSPC) if "PytorchStreamWriter" in str(error) else None
    return next((reason for reason in map(os.strerror, _WRITE_ERRORS) if reason in str(error)), unknown)
