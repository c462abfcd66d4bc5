"""Callbacks that gather a run's metrics, write them to files and services, and show them on the terminal."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from olmo_core.distributed.utils import get_rank, get_world_size
from olmo_core.train.callbacks import Callback, WandBCallback
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ultramem.files.whole_files import cannot_write
from ultramem.hosts.olmo_core.model import MemoryTransformer
from ultramem.hosts.olmo_core.moe import DroplessMoE
from ultramem.runs.directory import recorded_metrics
from ultramem.runs.layout import (
    HELD_OUT,
    LEARNING_RATES,
    TABLE_BANDWIDTH,
    TASK_METRICS,
    THROUGHPUT,
    TOKENS,
    TRAIN_LOSS,
    UTILISATION,
)

_COUNTED = 4  # one of this many tokens counts
# Metrics of OLMo-core that are redundant or meaningless.
_LEFT_OUT = ("throughput/", "checkpoint/", "optim/LR (", "train/masked labels", "train/PPL")


@dataclass
class LayerMetrics(Callback):
    """Reports every `interval` steps what memory layers and mixtures of experts read.

    Memory layers' reads are those of every fourth token.
    """

    priority: ClassVar[int] = 5  # before the checkpoint, so that a kill after it does not cost the report
    model: MemoryTransformer
    interval: int = 100

    def pre_train(self) -> None:
        """Start counting."""
        if self.model.memory is not None:
            self.model.memory.track_usage(every=_COUNTED)

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


@dataclass
class MetricsFile(Callback):
    """Appends the metrics of each step to a file of JSON lines, from the first process.

    Attributes:
        path: the file.
        table_bytes: bytes of tables that a token reads in a forward pass, for their rate.
    """

    priority: ClassVar[int] = 10
    path: Path = field(default_factory=Path)
    table_bytes: int = 0
    _times: dict[int, float] = field(default_factory=dict)
    _last: tuple[int, dict[str, float]] = (0, {})

    def pre_train(self) -> None:
        """Keep the metrics of the step that a run resumes from, in case it adds an evaluation that is missing."""
        self._last = self.step, recorded_metrics(self.path, self.step)

    def post_train_batch(self) -> None:
        """Record the time and the number of tokens so far."""
        self._times[self.step] = time.time()
        self.trainer.record_metric(TOKENS, self.trainer.global_train_tokens_seen)

    def pre_log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Replace OLMo-core's metrics with ours, for all callbacks."""
        del step
        speed, utilisation = (metrics.get(f"throughput/device/{name}") for name in ("TPS", "MFU"))
        for name in [name for name in metrics if name.startswith(_LEFT_OUT)]:
            del metrics[name]
        if speed is not None:
            metrics[THROUGHPUT] = speed * get_world_size()
            if self.table_bytes:
                metrics[TABLE_BANDWIDTH] = metrics[THROUGHPUT] * self.table_bytes
        if utilisation is not None:
            metrics[UTILISATION] = utilisation / 100

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Write a line. A step's metrics may come in several parts: its last line holds all of them."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if get_rank() != 0 or not finite:
            return
        earlier = self._last[1] if self._last[0] == step else {}
        self._last = step, earlier | finite
        line = {"step": step, "time": round(self._times.get(step, time.time()), 3), "metrics": self._last[1]}
        self._times = {noted: noted_at for noted, noted_at in self._times.items() if noted >= step}
        with cannot_write(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@dataclass
class TensorBoard(Callback):
    """Writes all metrics as TensorBoard events to a directory, in the first process.

    PyTorch's `SummaryWriter` writes in a thread, which shows its errors as tracebacks.
    """

    directory: Path = field(default_factory=Path)
    _file: Path | None = None

    def pre_train(self) -> None:
        """Begin an event file; events that an interrupted run wrote for later steps are to be ignored."""
        from tensorboard.compat.proto.event_pb2 import SessionLog

        if get_rank() == 0 and self._file is None:
            self._file = self.directory / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
            with cannot_write(self.directory):
                self.directory.mkdir(exist_ok=True)
            self._write(file_version="brain.Event:2")
            self._write(step=self.step + 1, session_log=SessionLog(status=SessionLog.START))

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Write."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        if get_rank() == 0:
            self.pre_train()  # an evaluation that another callback makes up for comes before
            values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
            self._write(step=step, summary=Summary(value=values))

    def _write(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        assert self._file is not None
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


@dataclass
class ProgressReport(Callback):
    """Shows progress in the first process: a live line on a terminal, else a line each `interval` steps."""

    console: Console = field(default_factory=Console)
    interval: int = 10
    _display: Progress | None = None
    _start: tuple[int, float] = (0, 0.0)
    _speed: float | None = None

    def pre_train(self) -> None:
        """Start the clock and the display."""
        self._start = self.step, time.monotonic()
        if self.console.is_terminal:
            self._display = Progress(
                TextColumn("step {task.completed:,}/{task.total:,}"),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=self.console,
                speed_estimate_period=300,
            )
            self._display.add_task("", total=self._total, completed=self.step)
            self._display.start()

    def post_step(self) -> None:
        """Advance the progress bar."""
        if self._display is not None:
            self._display.update(self._display.task_ids[0], completed=self.step)

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Show loss, tokens per second and learning rate; results of evaluations on lines of their own."""
        with cannot_write("standard output"):
            self._show_metrics(step, metrics)

    def _show_metrics(self, step: int, metrics: dict[str, float]) -> None:
        if TRAIN_LOSS in metrics:
            self._speed = metrics.get(THROUGHPUT, self._speed)
            parts = [f"loss {metrics[TRAIN_LOSS]:.4f}"]
            if self._speed is not None:
                parts.append(f"{self._speed:,.0f} tokens/s")
            parts.append(f"learning rate {metrics[LEARNING_RATES['model']]:.2e}")
            self._show(step, "  ".join(parts))
        if HELD_OUT["loss"] in metrics:
            found = {figure.replace("_", " "): metrics[name] for figure, name in HELD_OUT.items() if name in metrics}
            results = "  ".join(f"{figure} {value:.4f}" for figure, value in found.items())
            self.console.print(f"step {step:,}  held-out: {results}")
        tasks = {n.removeprefix(TASK_METRICS): value for n, value in metrics.items() if n.startswith(TASK_METRICS)}
        if tasks:  # the parts of a task have a slash in their names
            results = "  ".join(f"{name} {value:.3f}" for name, value in tasks.items() if "/" not in name)
            self.console.print(f"step {step:,}  tasks: {results}")

    def close(self) -> None:
        """Stop the display."""
        if self._display is not None:
            self._display.stop()

    @property
    def _total(self) -> int:
        assert self.trainer.max_steps is not None
        return self.trainer.max_steps

    def _show(self, step: int, text: str) -> None:
        if self._display is not None:
            self._display.update(self._display.task_ids[0], description=text)
        elif step % self.interval == 0 or step in (self._start[0] + 1, self._total):
            first, start = self._start
            seconds = round((time.monotonic() - start) / max(self.step - first, 1) * (self._total - self.step))
            left = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
            self.console.print(f"step {step:,}/{self._total:,}  {text}  {left} left")
