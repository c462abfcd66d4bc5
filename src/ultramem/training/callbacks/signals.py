"""Signals, on which a run stops with a checkpoint."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from types import FrameType

from olmo_core.distributed.utils import get_rank
from olmo_core.train.callbacks import Callback
from rich.console import Console


@dataclass
class StopOnSignal(Callback):
    """On SIGTERM or SIGINT the run stops after the step, with a checkpoint; a second SIGINT ends the process at once.

    Attributes:
        console: where to say so.
    """

    console: Console = field(default_factory=Console)

    def pre_train(self) -> None:
        """Replace OLMo-core's handlers, which ignore a second signal; it puts back the former ones at the end."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        del frame
        name = signal.Signals(number).name
        self.trainer.cancel_run(f"{name} received")
        signal.signal(signal.SIGINT, self._leave)
        if get_rank() == 0:
            self.console.print(f"{name}: saving a checkpoint after this step; Ctrl-C leaves at once without")

    def _leave(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.console.show_cursor()
        os._exit(128 + number)
