"""Metrics of what memory layers and mixtures of experts read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from olmo_core.train.callbacks import Callback

from ultramem.hosts.olmo_core.model import MemoryTransformer
from ultramem.hosts.olmo_core.moe import DroplessMoE

_COUNTED = 4  # reads are counted in one of this many steps


@dataclass
class LayerMetrics(Callback):
    """Reports what memory layers and mixtures of experts read; memory layers' reads are those of every fourth step.

    Attributes:
        model: the model.
        interval: steps between reports.
    """

    priority: ClassVar[int] = 5  # before the checkpoint, so that a kill after it does not cost the report
    model: MemoryTransformer
    interval: int = 100

    def pre_train(self) -> None:
        """Start counting."""
        if self.model.memory is not None:
            self.model.memory.track_usage()

    def pre_step(self, batch: dict[str, Any]) -> None:
        """Count in some steps only, including that of the report: launching so many small kernels takes time."""
        del batch
        if self.model.memory is not None:
            self.model.memory.pause_usage(self.step % self.interval % _COUNTED != 0)

    def post_train_batch(self) -> None:
        """Report, in all processes together."""
        if self.step % self.interval:
            return
        if self.model.memory is not None:
            for name, value in self.model.memory.usage_metrics().items():
                self.trainer.record_metric(f"memory/{name}", value)
        for number, block in self.model.blocks.items():
            if isinstance(block.feed_forward, DroplessMoE):
                for name, (value, reduce) in block.feed_forward.compute_metrics().items():
                    self.trainer.record_metric(f"moe/block {int(number):02d}/{name}", value, reduce)
