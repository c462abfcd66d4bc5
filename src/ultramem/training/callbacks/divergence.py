"""Stopping a run that has diverged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from olmo_core.train.callbacks import Callback

from ultramem.errors import UltraMemError
from ultramem.runs.layout import GRADIENT_NORM


@dataclass
class StopWhenDiverged(Callback):
    """Stops a run whose gradient is not finite; OLMo-core itself checks the loss only.

    Such a gradient spoils the parameters one step before the loss shows it.
    """

    priority: ClassVar[int] = 100

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Check the gradient norm."""
        norm = metrics.get(GRADIENT_NORM, 0.0)
        if not math.isfinite(norm):
            raise DivergedError("gradient norm", norm, step)


class DivergedError(UltraMemError):
    """The loss or the gradient is not finite."""

    def __init__(self, what: str, value: float, step: int) -> None:
        super().__init__(f"the {what} is {value} at step {step}")
