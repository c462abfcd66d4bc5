"""Evaluation during training, on held-out data and on tasks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from olmo_core.distributed.utils import broadcast_object
from olmo_core.train.callbacks import Callback, EvaluatorCallback

from ultramem.evaluation.tasks import TaskSuite
from ultramem.runs.directory import recorded_metrics
from ultramem.runs.layout import HELD_OUT_METRICS, TASK_METRICS
from ultramem.training.callbacks.checkpoints import Checkpoints
from ultramem.training.callbacks.timing import timed_apart


def make_up_for_kill(callback: Callback, metrics_file: Path, prefix: str) -> None:
    """Evaluate the step that a run resumes from, if it was killed between that step's checkpoint and its evaluation.

    Args:
        callback: its `post_step` evaluates, if that is due at its step.
        metrics_file: the run's metrics.
        prefix: begins the names of the evaluation's metrics.
    """
    if callback.step == 0:
        return
    recorded = recorded_metrics(metrics_file, callback.step)
    if not broadcast_object(any(name.startswith(prefix) for name in recorded)):
        callback.post_step()
        callback.trainer._log_metrics()  # no step follows the last one


@dataclass
class HeldoutCallback(EvaluatorCallback):
    """Evaluates on held-out data, without an effect on the metrics of training.

    Attributes:
        metrics_file: the run's metrics.
    """

    metrics_file: Path = field(default_factory=Path)

    def pre_train(self) -> None:
        """Make up for an evaluation that is missing."""
        make_up_for_kill(self, self.metrics_file, HELD_OUT_METRICS)

    def perform_eval(self, prefix: str = "eval") -> None:
        """Evaluate, and keep the metrics of training as they are."""
        with timed_apart(self):
            super().perform_eval(prefix)


@dataclass
class TaskCallback(Callback):
    """Evaluates the model on tasks; all processes share the work.

    Attributes:
        suite: tasks.
        interval: steps between evaluations, besides that of the last step; None for the last step only.
        last_step: last training step.
        checkpoints: callback that saves the last checkpoint before its evaluation.
        metrics_file: the run's metrics.
    """

    suite: TaskSuite
    interval: int | None
    last_step: int
    checkpoints: Checkpoints
    metrics_file: Path

    def pre_train(self) -> None:
        """Make up for an evaluation that is missing."""
        make_up_for_kill(self, self.metrics_file, TASK_METRICS)

    def post_step(self) -> None:
        """Evaluate every `interval` steps and after the last one."""
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
