"""Signals that stop a run with a checkpoint."""

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
    """Stops the run on SIGTERM or SIGINT, after a checkpoint at the step's end; a second SIGINT exits at once.

    Attributes:
        console: console for a message about it.
    """

    console: Console = field(default_factory=Console)

    def pre_train(self) -> None:
        """Replace OLMo-core's handlers, which ignore a second signal; OLMo-core restores the former ones at the end."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        del frame
        name = signal.Signals(number).name
        self.trainer.cancel_run(f"{name} received")
        signal.signal(signal.SIGINT, self._leave)
        if get_rank() == 0:
            self.console.print(f"{name}: saving a checkpoint after this step; press Ctrl-C to exit at once without one")

    def _leave(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.console.show_cursor()
        os._exit(128 + number)
