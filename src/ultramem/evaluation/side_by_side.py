"""Several checkpoints evaluated one after the other: a table with a column for each, and a file in each run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultramem.evaluation.loss import evaluate, print_losses
from ultramem.evaluation.task_evaluation import evaluate_tasks, print_task_table
from ultramem.runs.checkpoints import find_checkpoint


def show_losses(
    paths: Sequence[Path], data: Sequence[Path] = (), *, output: Path | None = None, **options: Any
) -> None:
    """Evaluate checkpoints on token files, print the table and where the results are.

    Args:
        paths: of the checkpoints.
        data: as in `evaluate`.
        output: JSON file to write, for one checkpoint; by default each run's `evaluation.json`, for its held-out split.
        options: of `evaluate`.

    Raises:
        ConfigError, UltraMemError: as in `evaluate`; mistakes in `paths` come before the work.
    """
    for path in paths:
        find_checkpoint(path)
    evaluations, written = [], []
    for path in paths:
        evaluation = evaluate(path, data, **options)
        evaluations.append(evaluation)
        if output or evaluation.split == "heldout":
            written.append(evaluation.save(output))
    print_losses(evaluations)
    _print_files(written)


def show_tasks(paths: Sequence[Path], tasks: Sequence[str], *, output: Path | None = None, **options: Any) -> None:
    """Evaluate checkpoints on tasks, print the table and where the results are.

    Args:
        paths: of the checkpoints.
        tasks: names of tasks or groups of them.
        output: JSON file to write, for one checkpoint; by default each run's `tasks.json`.
        options: of `evaluate_tasks`.

    Raises:
        ConfigError, UltraMemError: as in `evaluate_tasks`.
    """
    evaluations, written = [], []
    for evaluation in evaluate_tasks(paths, tasks, **options):
        evaluations.append(evaluation)
        written.append(evaluation.save(output))
    print_task_table(evaluations)
    _print_files(written)


def _print_files(paths: Sequence[Path]) -> None:
    for path in paths:
        print(f"written to {path}")
