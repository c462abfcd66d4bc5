"""The run directory's `metrics.jsonl`."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from olmo_core.distributed.utils import get_rank, get_world_size
from olmo_core.train.callbacks import Callback

from ultramem.runs.layout import THROUGHPUT, TOKENS

# Metrics of OLMo-core that are redundant or meaningless.
_LEFT_OUT = ("throughput/", "checkpoint/", "optim/LR (", "train/masked labels", "train/PPL")


@dataclass
class MetricsFile(Callback):
    """Appends the metrics of each step to a file of JSON lines, from the first process.

    Attributes:
        path: path of the file.
    """

    priority: ClassVar[int] = 10
    path: Path = field(default_factory=Path)
    _times: dict[int, float] = field(default_factory=dict)
    _last: tuple[int, dict[str, float]] = (0, {})

    def post_train_batch(self) -> None:
        """Record the time and the number of tokens so far."""
        self._times[self.step] = time.time()
        self.trainer.record_metric(TOKENS, self.trainer.global_train_tokens_seen)

    def pre_log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Replace OLMo-core's metrics with ours, for all callbacks."""
        del step
        speed = metrics.get("throughput/device/TPS")
        for name in [name for name in metrics if name.startswith(_LEFT_OUT)]:
            del metrics[name]
        if speed is not None:
            metrics[THROUGHPUT] = speed * get_world_size()

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Write a line. A step's metrics may come in several parts: its last line holds all of them."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if get_rank() != 0 or not finite:
            return
        earlier = self._last[1] if self._last[0] == step else {}
        self._last = step, earlier | finite
        line = {"step": step, "time": round(self._times.get(step, time.time()), 3), "metrics": self._last[1]}
        self._times = {noted: noted_at for noted, noted_at in self._times.items() if noted >= step}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # a full disk has no file name
            raise OSError(error.errno, error.strerror, str(self.path)) from error
