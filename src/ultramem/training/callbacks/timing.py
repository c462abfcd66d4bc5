"""What a run does besides training, kept out of its reported speed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from olmo_core.train.callbacks import Callback, SpeedMonitorCallback


@contextmanager
def timed_apart(callback: Callback) -> Iterator[None]:
    """Keep what happens inside out of the reported speed of training."""
    yield
    for other in callback.trainer.callbacks.values():
        if isinstance(other, SpeedMonitorCallback):
            other.reset()
