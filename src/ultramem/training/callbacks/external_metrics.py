"""Metrics in TensorBoard and Weights & Biases."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olmo_core.distributed.utils import get_rank
from olmo_core.train.callbacks import Callback, WandBCallback

from ultramem.files.whole_files import cannot_write


@dataclass
class TensorBoard(Callback):
    """Writes all metrics as TensorBoard events, in the first process.

    PyTorch's `SummaryWriter` writes in a thread, which shows its errors as tracebacks.

    Attributes:
        directory: directory of the event files.
    """

    directory: Path = field(default_factory=Path)
    _file: Path = field(default_factory=Path)

    def pre_train(self) -> None:
        """Begin an event file; events that an interrupted run wrote for later steps are to be ignored."""
        from tensorboard.compat.proto.event_pb2 import SessionLog

        if get_rank() == 0:
            self._file = self.directory / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
            with cannot_write(self.directory):
                self.directory.mkdir(exist_ok=True)
            self._write(file_version="brain.Event:2")
            self._write(step=self.step + 1, session_log=SessionLog(status=SessionLog.START))

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Write."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        if get_rank() == 0:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
            self._write(step=step, summary=Summary(value=values))

    def _write(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        with cannot_write(self._file), self._file.open("ab") as file:
            RecordWriter(file).write(Event(wall_time=time.time(), **content).SerializeToString())


@dataclass
class WeightsAndBiases(WandBCallback):
    """OLMo-core's callback, made to work with recent versions of wandb."""

    def finalize(self, exit_code: int = 0) -> None:
        """Finish the run on Weights & Biases."""
        if not self.finalized:
            self.wandb.finish(exit_code=exit_code)
            self._finalized = True
