"""Checkpoints of a run."""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmo_core.distributed.utils import get_fs_local_rank, get_rank
from olmo_core.train.callbacks import CheckpointerCallback
from olmo_core.train.callbacks.checkpointer import CheckpointRemovalStrategy
from torch.distributed.checkpoint.api import CheckpointException

from ultramem.errors import UltraMemError
from ultramem.runs.checkpoints import checkpoint_name, complete_steps, others_in_checkpoint, remove_checkpoint
from ultramem.training.callbacks.timing import timed_apart

_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO, errno.ESTALE)


@dataclass
class Checkpoints(CheckpointerCallback):
    """Writes periodic checkpoints: after a failure never an incomplete one, and none of a run that has diverged."""

    def __post_init__(self) -> None:
        self.save_async, self.pre_train_checkpoint = False, False
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

    def _save_checkpoint(self, save_async: bool | None = None, ephemeral: bool = False) -> str:
        directory = Path(self.save_folder) / self.checkpointer.checkpoint_dirname(self.step)
        places = directory, directory.with_name(f"{directory.name}-tmp")
        for place in filter(Path.exists, places if get_rank() == 0 else ()):
            if others_in_checkpoint(place):
                raise UltraMemError(f"{place} is in the way of a checkpoint; rename it and run the same command again")
        try:
            with timed_apart(self):
                return super()._save_checkpoint(save_async, ephemeral)
        except (Exception, CheckpointException) as error:  # a CheckpointException is not an Exception
            cause = _cause(error)
            if cause is None or isinstance(error, UltraMemError):  # the latter is of another file, such as the metrics
                raise
            for unfinished in filter(Path.exists, places):
                with contextlib.suppress(OSError):
                    remove_checkpoint(unfinished)
            raise UltraMemError(
                f"the checkpoint of step {self.step} cannot be written to {directory} ({cause}); free some space and "
                "run the same command again"
            ) from error


def _cause(error: BaseException) -> str | None:
    """Why writing failed; None if the file system was not the cause.

    Found in the text of the error, as OLMo-core and PyTorch wrap the system's error in their own.
    """
    # PyTorch's writer does not give the reason; this is by far the most frequent one.
    unknown = os.strerror(errno.ENOSPC) if "PytorchStreamWriter" in str(error) else None
    return next((reason for reason in map(os.strerror, _WRITE_ERRORS) if reason in str(error)), unknown)
