"""Excluding evaluations and the like from a run's reported speed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from olmo_core.train.callbacks import Callback, SpeedMonitorCallback


@contextmanager
def timed_apart(callback: Callback) -> Iterator[None]:
    """Exclude the time inside from the reported speed of training."""
    yield
    for other in callback.trainer.callbacks.values():
        if isinstance(other, SpeedMonitorCallback):
            other.reset()
