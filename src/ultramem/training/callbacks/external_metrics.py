"""Metrics in TensorBoard and Weights & Biases."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from olmo_core.distributed.utils import get_rank
from olmo_core.train.callbacks import Callback, WandBCallback

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@dataclass
class TensorBoard(Callback):
    """Writes all metrics as TensorBoard events, in the first process.

    Attributes:
        directory: directory of the event files.
    """

    directory: Path = field(default_factory=Path)
    _writer: SummaryWriter | None = None

    def pre_train(self) -> None:
        """Open the event file; events that an interrupted run wrote for later steps are to be ignored."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        if get_rank() == 0:
            self._writer = SummaryWriter(self.directory, purge_step=self.step + 1)

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Write."""
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


@dataclass
class WeightsAndBiases(WandBCallback):
    """OLMo-core's callback, made to work with recent versions of wandb."""

    def finalize(self, exit_code: int = 0) -> None:
        """Finish the run on Weights & Biases."""
        if not self.finalized:
            self.wandb.finish(exit_code=exit_code)
            self._finalized = True
