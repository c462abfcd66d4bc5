"""Evaluation of checkpoints: loss on token files, tasks, and generated text."""

from ultramem.evaluation.generation import (
    Sample,
    SamplingConfig,
    TextGenerator,
    print_samples,
    read_prompt,
    sample,
    save_samples,
    show_samples,
)
from ultramem.evaluation.loss import Evaluation, evaluate
from ultramem.evaluation.side_by_side import print_losses, print_task_table
from ultramem.evaluation.tasks import TaskEvaluation, evaluate_tasks
from ultramem.runs.checkpoints import Checkpoint, find_checkpoint, load_model
from ultramem.runs.results import TaskResult

__all__ = [
    "Checkpoint",
    "Evaluation",
    "Sample",
    "SamplingConfig",
    "TaskEvaluation",
    "TaskResult",
    "TextGenerator",
    "evaluate",
    "evaluate_tasks",
    "find_checkpoint",
    "load_model",
    "print_losses",
    "print_samples",
    "print_task_table",
    "read_prompt",
    "sample",
    "save_samples",
    "show_samples",
]
