"""Evaluating several checkpoints side by side: a table with a column for each, and a file in each run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from ultramem.errors import UltraMemError
from ultramem.evaluation.loss import Evaluation, evaluate
from ultramem.evaluation.tasks import GROUPS, TaskEvaluation, evaluate_tasks
from ultramem.files.whole_files import check_output
from ultramem.runs.checkpoints import find_checkpoint
from ultramem.runs.layout import EVALUATION_NAME, TASKS_NAME
from ultramem.runs.results import holds_results


def show_losses(
    paths: Sequence[Path], data: Sequence[Path] = (), *, output: Path | None = None, **options: Any
) -> None:
    """Evaluate checkpoints on token files, and print a table and the paths of the results.

    `output` is a JSON file to write, for a single checkpoint; by default each run's `evaluation.json`, for its own
    held-out data. Data, options and errors are those of `evaluate`. Errors in `paths` and files that cannot be written
    come before any evaluation; if a file cannot be written at the end, the table is printed all the same.
    """
    for path in paths:
        checkpoint = find_checkpoint(path)
        if output or (options.get("split") in (None, "heldout") and all(path.is_dir() for path in data)):
            check_output(output or checkpoint.run / EVALUATION_NAME, holds_results)
    evaluations, notes = [], []
    for path in paths:
        evaluation = evaluate(path, data, **options)
        evaluations.append(evaluation)
        file = _save_last(evaluations, output, print_losses)
        has_all = f"has {evaluation.checkpoint} on all tokens"
        reason = has_all if evaluation.of_run else "is for the run's own held-out data"
        notes.append(_note(file, evaluation.run / EVALUATION_NAME, reason))
    print_losses(evaluations)
    for note in notes:
        print(note)


def show_tasks(paths: Sequence[Path], tasks: Sequence[str], *, output: Path | None = None, **options: Any) -> None:
    """Evaluate checkpoints on tasks, and print a table and the paths of the results.

    `output` is a JSON file to write, for a single checkpoint; by default each run's `tasks.json`. Tasks, options and
    errors are those of `evaluate_tasks`, and for files as in `show_losses`.
    """
    for path in paths:
        check_output(output or find_checkpoint(path).run / TASKS_NAME, holds_results)
    evaluations, notes = [], []
    for evaluation in evaluate_tasks(paths, tasks, **options):
        evaluations.append(evaluation)
        file = _save_last(evaluations, output, print_task_table)
        reason = f"has {evaluation.checkpoint} on all questions"
        notes.append(_note(file, evaluation.run / TASKS_NAME, reason))
    print_task_table(evaluations)
    for note in notes:
        print(note)


def _save_last(evaluations: list[Any], output: Path | None, show: Callable[[list[Any]], None]) -> Path | None:
    """Save the last evaluation; if that fails, show all of them: what was computed is not lost."""
    try:
        file: Path | None = evaluations[-1].save(output)
    except UltraMemError:
        show(evaluations)
        raise
    return file


def _note(written: Path | None, own: Path, reason: str) -> str:
    """Where results were written, or why the run's own file was left as it is."""
    return f"written to {written}" if written else f"not written: {own} {reason}; choose another file with --output"


def print_losses(evaluations: Sequence[Evaluation]) -> None:
    """Print a table with a column for each evaluation."""
    splits = " and ".join(dict.fromkeys(evaluation.split for evaluation in evaluations))
    single = evaluations[0].checkpoint if len(evaluations) == 1 else "loss"
    columns = (Column(name, justify="right") for name in _column_names(evaluations))
    table = Table("", *columns, title=f"{single} on {splits}", show_header=len(evaluations) > 1)
    for label, field, form in (
        ("predicted tokens", "tokens", ","),
        ("loss (nats per token)", "loss", ".4f"),
        ("perplexity", "perplexity", ",.3f"),
        ("bits per byte", "bits_per_byte", ".4f"),
        ("unigram bits per byte", "unigram_bits_per_byte", ".4f"),
        ("tokens per second", "tokens_per_second", ",.0f"),
    ):
        values = [getattr(evaluation, field) for evaluation in evaluations]
        if any(value is not None for value in values):
            table.add_row(label, *("" if value is None else format(value, form) for value in values))
    Console().print(table)


def print_task_table(evaluations: Sequence[TaskEvaluation]) -> None:
    """Print a table with a column for each of several evaluations on the same tasks.

    A cell is empty where a part of a task is too long for the model.
    """
    names = _column_names(evaluations)
    numbers = (Column(name, justify="right") for name in ("questions", "chance", *names))
    table = Table(Column("task", overflow="fold"), *numbers, title="percent ± standard error")
    columns = [{result.name: result for result in evaluation.results} for evaluation in evaluations]
    tasks = {name: result for column in reversed(columns) for name, result in column.items()}
    for result in sorted(tasks.values(), key=lambda result: result.name in GROUPS):
        own = (column.get(result.name) for column in columns)
        figures = (f"{100 * one.value:.1f} ± {100 * one.standard_error:.1f}" if one else "" for one in own)
        if result.name in GROUPS:
            table.add_section()
        label = f"{result.name} (mean)" if result.name in GROUPS else result.name
        table.add_row(label, f"{result.questions:,}", f"{100 * result.chance:.1f}", *figures)
    table.add_section()
    table.add_row("tokens per second", "", "", *(f"{e.tokens_per_second:,.0f}" for e in evaluations))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    metrics: dict[str, dict[str, None]] = {}  # with the tasks that have them
    for result in tasks.values():
        if result.name not in GROUPS:
            metrics.setdefault(result.metric, {})[result.name.partition("/")[0]] = None
    for metric, names_of_tasks in metrics.items():
        console.print(f"{metric}: {', '.join(names_of_tasks)}")
    for name, evaluation in zip(names, evaluations, strict=True):
        cut = [f"{r.name} {100 * r.cut:.3g} %" for r in evaluation.results if r.cut and r.name not in GROUPS]
        if cut:
            console.print(f"{name}: contexts cut on the left to {evaluation.context_length} tokens: {', '.join(cut)}")


def _column_names(evaluations: Sequence[Evaluation] | Sequence[TaskEvaluation]) -> list[str]:
    """Headers of a rich table: run directory and checkpoint, with the whole path if two names are the same."""
    names = [f"{evaluation.run.name}/{evaluation.checkpoint}" for evaluation in evaluations]
    if len(set(names)) < len(names):
        names = [f"{evaluation.run}/{evaluation.checkpoint}" for evaluation in evaluations]
    return [escape(name) for name in names]
