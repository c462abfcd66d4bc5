"""Progress of a run on the terminal."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from olmo_core.train.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ultramem.files.whole_files import cannot_write
from ultramem.runs.layout import HELD_OUT, LEARNING_RATES, TASK_METRICS, THROUGHPUT, TRAIN_LOSS


@dataclass
class ProgressReport(Callback):
    """Shows progress in the first process: a live line on a terminal, else a line per report.

    Attributes:
        console: console to print to.
        interval: steps between lines.
    """

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
        if tasks:
            # Without the many parts of tasks.
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
            self.console.print(f"step {step:,}/{self._total:,}  {text}  {self._remaining()}")

    def _remaining(self) -> str:
        first, start = self._start
        seconds = round((time.monotonic() - start) / max(self.step - first, 1) * (self._total - self.step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"
