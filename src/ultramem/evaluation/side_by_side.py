"""Evaluating several checkpoints side by side: a table with a column for each, and a file in each run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultramem.evaluation.loss import Evaluation, evaluate, print_losses
from ultramem.evaluation.task_evaluation import evaluate_tasks, print_task_table
from ultramem.runs.checkpoints import find_checkpoint
from ultramem.runs.layout import EVALUATION_NAME


def show_losses(
    paths: Sequence[Path], data: Sequence[Path] = (), *, output: Path | None = None, **options: Any
) -> None:
    """Evaluate checkpoints on token files, and print a table and the paths of the results.

    Args:
        paths: paths of the checkpoints.
        data: as in `evaluate`.
        output: JSON file to write, for a single checkpoint; by default each run's `evaluation.json`, for its held-out
            split.
        options: options of `evaluate`.

    Raises:
        ConfigError, UltraMemError: as in `evaluate`; errors in `paths` come before any evaluation.
    """
    for path in paths:
        find_checkpoint(path)
    evaluations, notes = [], []
    for path in paths:
        evaluation = evaluate(path, data, **options)
        evaluations.append(evaluation)
        if output or evaluation.split == "heldout":
            notes.append(_note(evaluation, evaluation.save(output)))
    print_losses(evaluations)
    for note in notes:
        print(note)


def show_tasks(paths: Sequence[Path], tasks: Sequence[str], *, output: Path | None = None, **options: Any) -> None:
    """Evaluate checkpoints on tasks, and print a table and the paths of the results.

    Args:
        paths: paths of the checkpoints.
        tasks: names of tasks or groups of tasks.
        output: JSON file to write, for a single checkpoint; by default each run's `tasks.json`.
        options: options of `evaluate_tasks`.

    Raises:
        ConfigError, UltraMemError: as in `evaluate_tasks`.
    """
    evaluations, written = [], []
    for evaluation in evaluate_tasks(paths, tasks, **options):
        evaluations.append(evaluation)
        written.append(evaluation.save(output))
    print_task_table(evaluations)
    for file in written:
        print(f"written to {file}")


def _note(evaluation: Evaluation, file: Path | None) -> str:
    if file is not None:
        return f"written to {file}"
    own = evaluation.run / EVALUATION_NAME
    return f"not written: {own} has {evaluation.checkpoint} on all tokens; choose another file with --output"
