"""What a run does besides training: reports, checkpoints, signals, as callbacks of OLMo-core's trainer."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from olmo_core.distributed.utils import get_rank, get_world_size
from olmo_core.train.callbacks import (
    Callback,
    CheckpointerCallback,
    EvaluatorCallback,
    SpeedMonitorCallback,
    WandBCallback,
)
from olmo_core.train.callbacks.checkpointer import CheckpointRemovalStrategy
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch.distributed.checkpoint.api import CheckpointException

from ultramem.errors import UltraMemError
from ultramem.evaluation.task_suite import TaskSuite
from ultramem.hosts.olmo_core.model import MemoryTransformer
from ultramem.hosts.olmo_core.moe import DroplessMoE
from ultramem.run_layout import GRADIENT_NORM, HELD_OUT, LEARNING_RATES, TASK_METRICS, THROUGHPUT, TOKENS, TRAIN_LOSS

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO, errno.ESTALE)
# Metrics of OLMo-core that say the same or nothing.
_LEFT_OUT = ("throughput/", "checkpoint/", "optim/LR (", "train/masked labels", "train/PPL")


@dataclass
class StepSeed(Callback):
    """Seeds each step's random numbers (dropout) by its number, so that a resumed run draws the same ones.

    Attributes:
        seed: of the run.
    """

    seed: int = 0

    def pre_step(self, batch: dict[str, Any]) -> None:
        """Seed this process's generators."""
        del batch
        entropy = np.random.SeedSequence([self.seed, self.step, get_rank()])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1)))


@dataclass
class LayerMetrics(Callback):
    """Reports what memory layers and mixtures of experts read.

    Attributes:
        model: the model.
        interval: steps between reports.
    """

    model: MemoryTransformer
    interval: int = 100

    def pre_train(self) -> None:
        """Start counting."""
        if self.model.memory is not None:
            self.model.memory.track_usage()

    def post_train_batch(self) -> None:
        """Report; all processes take part."""
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
class StopWhenDiverged(Callback):
    """Stops a run whose gradient is no longer finite; OLMo-core itself looks at the loss only.

    A gradient without a finite norm spoils the parameters one step before the loss shows it.
    """

    priority: ClassVar[int] = 100

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Look at the gradient norm."""
        norm = metrics.get(GRADIENT_NORM, 0.0)
        if not math.isfinite(norm):
            raise DivergedError("gradient norm", norm, step)


class DivergedError(UltraMemError):
    """The loss or the gradient is no longer finite."""

    def __init__(self, what: str, value: float, step: int) -> None:
        super().__init__(f"the {what} is {value} at step {step}")


@dataclass
class MetricsFile(Callback):
    """Appends the metrics of each step to a file of JSON lines, from the first process.

    Attributes:
        path: the file.
    """

    priority: ClassVar[int] = 10
    path: Path = field(default_factory=Path)
    _times: dict[int, float] = field(default_factory=dict)
    _last: tuple[int, dict[str, float]] = (0, {})

    def post_train_batch(self) -> None:
        """Note the time, and the tokens so far."""
        self._times[self.step] = time.time()
        self.trainer.record_metric(TOKENS, self.trainer.global_train_tokens_seen)

    def pre_log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Bring OLMo-core's metrics into ours, for all callbacks."""
        del step
        speed = metrics.get("throughput/device/TPS")
        for name in [name for name in metrics if name.startswith(_LEFT_OUT)]:
            del metrics[name]
        if speed is not None:
            metrics[THROUGHPUT] = speed * get_world_size()

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Write a line. Reports that belong to the same step come in parts: the last line holds all of them."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if get_rank() != 0 or not finite:
            return
        earlier = self._last[1] if self._last[0] == step else {}
        self._last = step, earlier | finite
        line = {"step": step, "time": round(self._times.get(step, time.time()), 3), "metrics": self._last[1]}
        for noted in [noted for noted in self._times if noted < step]:
            del self._times[noted]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@dataclass
class TensorBoard(Callback):
    """Writes all metrics as TensorBoard events, from the first process.

    Attributes:
        directory: where to.
    """

    directory: Path = field(default_factory=Path)
    _writer: SummaryWriter | None = None

    def pre_train(self) -> None:
        """Open the event file; what an interrupted run wrote of later steps is to be ignored."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        if get_rank() == 0:
            self._writer = SummaryWriter(self.directory, purge_step=self.step + 1)

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Write."""
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


@dataclass
class WeightsAndBiases(WandBCallback):
    """OLMo-core's, working with recent versions of wandb, too."""

    def finalize(self, exit_code: int = 0) -> None:
        """End the run there."""
        if not self.finalized:
            self.wandb.finish(exit_code=exit_code)
            self._finalized = True


@dataclass
class ProgressReport(Callback):
    """Shows progress from the first process: a live line on a terminal, else a line at each report.

    Attributes:
        console: where to.
        interval: steps from one line to the next.
    """

    console: Console = field(default_factory=Console)
    interval: int = 10
    _display: Progress | None = None
    _task: TaskID | None = None
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
            self._task = self._display.add_task("", total=self._total, completed=self.step)
            self._display.start()

    def post_step(self) -> None:
        """Move the bar."""
        if self._display is not None and self._task is not None:
            self._display.update(self._task, completed=self.step)

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Show the loss, tokens per second and learning rate; results of evaluations get lines of their own."""
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
        if tasks:
            # Not those of parts, which are many.
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
        if self._display is not None and self._task is not None:
            self._display.update(self._task, description=text)
        elif step % self.interval == 0 or step in (self._start[0] + 1, self._total):
            self.console.print(f"step {step:,}/{self._total:,}  {text}  {self._remaining()}")

    def _remaining(self) -> str:
        first, start = self._start
        seconds = round((time.monotonic() - start) / max(self.step - first, 1) * (self._total - self.step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"


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


@dataclass
class Checkpoints(CheckpointerCallback):
    """Periodic checkpoints, which a failure never leaves half written, and none of a run that has diverged."""

    def __post_init__(self) -> None:
        self.save_async, self.pre_train_checkpoint = False, False
        self.remove = CheckpointRemovalStrategy.never  # of ephemeral checkpoints, of which there are none
        super().__post_init__()

    def post_checkpoint_loaded(self, path: Any) -> None:
        """What was loaded need not be saved again."""
        self._latest_checkpoint_step, self._latest_checkpoint_path = self.step, str(path)

    def pre_train(self) -> None:
        """Count the checkpoints that are there among those to keep."""
        super().pre_train()
        found = sorted(self.checkpointer.find_checkpoints(self.save_folder))
        self._checkpoints = [path for step, path in found if step <= self.step]

    def _save_checkpoint(self, save_async: bool | None = None, ephemeral: bool = False) -> str:
        try:
            with timed_apart(self):
                return super()._save_checkpoint(save_async, ephemeral)
        except (Exception, CheckpointException) as error:  # the latter is none of the former
            cause = _cause(error)
            if cause is None:
                raise
            directory = Path(self.save_folder) / self.checkpointer.checkpoint_dirname(self.step)
            for unfinished in (directory, directory.with_name(f"{directory.name}-tmp")):
                shutil.rmtree(unfinished, ignore_errors=True)
            raise UltraMemError(
                f"the checkpoint of step {self.step} cannot be written to {directory}: {cause}: make room and run the "
                "same command again"
            ) from error


def _cause(error: BaseException) -> str | None:
    """Why writing failed, in a few words; None if not by the file system.

    From the text, since OLMo-core and PyTorch wrap the system's error in errors of their own.
    """
    text = str(error)
    for number in _WRITE_ERRORS:
        if os.strerror(number) in text:
            return os.strerror(number)
    # PyTorch's writer does not tell the reason, of which this is by far the most frequent.
    return os.strerror(errno.ENOSPC) if "PytorchStreamWriter" in text else None


@dataclass
class HeldoutEvaluation(EvaluatorCallback):
    """Evaluation on held-out data that leaves no trace in the metrics of training."""

    def perform_eval(self, prefix: str = "eval") -> None:
        """Evaluate apart from training."""
        with timed_apart(self):
            super().perform_eval(prefix)


@dataclass
class TaskEvaluation(Callback):
    """Evaluates the model on tasks; all processes share the work.

    Attributes:
        suite: the tasks.
        interval: steps between evaluations; None for the last step alone, which is always one.
        last_step: of the training.
        checkpoints: what saves the last one before its evaluation.
    """

    suite: TaskSuite
    interval: int | None
    last_step: int
    checkpoints: Checkpoints

    def post_step(self) -> None:
        """Evaluate where it is time to."""
        if self.step != self.last_step and (self.interval is None or self.step % self.interval):
            return
        if self.step == self.last_step:  # a failure from here on must not cost the steps
            self.checkpoints.post_train()
        model = self.trainer.train_module.model
        with timed_apart(self):
            model.eval()
            results = self.suite.run(model, group=self.trainer.dp_process_group)
            model.train()
        for result in results:
            self.trainer.record_metric(f"{TASK_METRICS}{result.name}", result.value)


@contextmanager
def timed_apart(callback: Callback) -> Iterator[None]:
    """Keep what happens inside out of the reported speed of training."""
    yield
    for other in callback.trainer.callbacks.values():
        if isinstance(other, SpeedMonitorCallback):
            other.reset()
