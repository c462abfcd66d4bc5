"""What a run does besides training, kept out of the metrics of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from olmo_core.train.callbacks import Callback, SpeedMonitorCallback


@contextmanager
def apart_from_training(callback: Callback) -> Iterator[None]:
    """Keep what the model does inside out of the metrics of training: the memory's reads, and the time."""
    memory = callback.trainer.train_module.model.memory
    layers = [] if memory is None else memory.layers
    counting = [layer.usage for layer in layers]
    for layer in layers:
        layer.usage = None
    with timed_apart(callback):
        yield
    for layer, usage in zip(layers, counting, strict=True):
        layer.usage = usage


@contextmanager
def timed_apart(callback: Callback) -> Iterator[None]:
    """Keep what happens inside out of the reported speed of training."""
    yield
    for other in callback.trainer.callbacks.values():
        if isinstance(other, SpeedMonitorCallback):
            other.reset()
