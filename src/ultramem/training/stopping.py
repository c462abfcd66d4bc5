"""Stopping a run early: signals, which stop it with a checkpoint, and divergence."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import dataclass, field
from types import FrameType
from typing import ClassVar

from olmo_core.distributed.utils import get_rank
from olmo_core.train.callbacks import Callback
from rich.console import Console

from ultramem.errors import UltraMemError
from ultramem.runs.layout import GRADIENT_NORM, TABLE_GRADIENT_NORM


@dataclass
class StopOnSignal(Callback):
    """Stops the run on SIGTERM or SIGINT, after a checkpoint at the step's end; a second SIGINT exits at once."""

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


@dataclass
class StopWhenDiverged(Callback):
    """Stops a run whose gradient is not finite; OLMo-core itself checks the loss only.

    Such a gradient spoils the parameters one step before the loss shows it.
    """

    priority: ClassVar[int] = 100

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Check the gradient norms."""
        for name in (GRADIENT_NORM, TABLE_GRADIENT_NORM):
            norm = metrics.get(name, 0.0)
            if not math.isfinite(norm):
                raise DivergedError("gradient norm", norm, step)


class DivergedError(UltraMemError):
    """The loss or the gradient is not finite."""

    def __init__(self, what: str, value: float, step: int) -> None:
        super().__init__(f"the {what} is {value} at step {step}")
        self.step = step
