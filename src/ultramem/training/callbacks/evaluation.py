"""Evaluation during training, on held-out data and on tasks."""

from __future__ import annotations

from dataclasses import dataclass

from olmo_core.train.callbacks import Callback, EvaluatorCallback

from ultramem.evaluation.tasks import TaskSuite
from ultramem.runs.layout import TASK_METRICS
from ultramem.training.callbacks.checkpoints import Checkpoints
from ultramem.training.callbacks.timing import timed_apart


@dataclass
class HeldoutCallback(EvaluatorCallback):
    """Evaluates on held-out data, without an effect on the metrics of training."""

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
    """

    suite: TaskSuite
    interval: int | None
    last_step: int
    checkpoints: Checkpoints

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
