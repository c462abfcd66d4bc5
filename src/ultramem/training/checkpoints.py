"""Writing and loading the checkpoints of a run."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from olmo_core.train import Trainer
from olmo_core.train.callbacks import Callback, CheckpointerCallback, SpeedMonitorCallback
from olmo_core.train.callbacks.checkpointer import CheckpointRemovalStrategy
from torch.distributed.checkpoint.api import CheckpointException

from ultramem.errors import UltraMemError
from ultramem.training.reproducible import environment_variable

_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO, errno.ESTALE)
# OLMo-core's state of a run has NumPy's random state besides plain values and tensors.
_STATE_TYPES: list[Any] = [np.empty(0).__reduce__()[0], np.ndarray, np.dtype, np.dtypes.UInt32DType]


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
        self.save_async, self.pre_train_checkpoint = False, False
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

    def _save_checkpoint(self, save_async: bool | None = None, ephemeral: bool = False) -> str:
        try:
            with timed_apart(self):
                return super()._save_checkpoint(save_async, ephemeral)
        except (Exception, CheckpointException) as error:  # a CheckpointException is not an Exception
            # OLMo-core and PyTorch wrap the system's error in their own. PyTorch's writer hides the reason,
            # most often a full disk.
            unknown = os.strerror(errno.ENOSPC) if "PytorchStreamWriter" in str(error) else None
            cause = next((reason for reason in map(os.strerror, _WRITE_ERRORS) if reason in str(error)), unknown)
            if cause is None:
                raise
            directory = Path(self.save_folder) / self.checkpointer.checkpoint_dirname(self.step)
            for unfinished in (directory, directory.with_name(f"{directory.name}-tmp")):
                shutil.rmtree(unfinished, ignore_errors=True)
            raise UltraMemError(
                f"the checkpoint of step {self.step} cannot be written to {directory} ({cause}); free some space and "
                "run the same command again"
            ) from error


def load_checkpoint(trainer: Trainer, checkpoint: Path) -> None:
    """Load a checkpoint; only plain types of the trainer state are unpickled."""
    try:
        # Every `torch.load`, also OLMo-core's, must refuse pickles that hold more than data.
        weights_only = environment_variable("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
        with weights_only, torch.serialization.safe_globals(_STATE_TYPES):
            trainer.load_checkpoint(checkpoint, load_trainer_state=True, load_optim_state=True)
    except (Exception, CheckpointException) as error:
        if "fingerprint" in str(error):
            raise UltraMemError(
                f"the training data has changed since {checkpoint} was written; restore it, or start another run"
            ) from error
        lines = (str(error).strip() or type(error).__name__).splitlines()
        reason = lines[-1 if isinstance(error, CheckpointException) else 0]  # the former begins with a traceback
        raise UltraMemError(
            f"{checkpoint} is damaged ({reason}); remove that directory to resume from the checkpoint before it"
        ) from error
