"""Checkpoints evaluated on tasks, side by side."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from ultramem.errors import ConfigError
from ultramem.evaluation.scoring import BATCH_TOKENS
from ultramem.evaluation.table_columns import column_names
from ultramem.evaluation.task_suite import GROUPS, TaskSuite, check_max_questions, task_names, with_means
from ultramem.files.json_files import write_json
from ultramem.runs.checkpoints import Checkpoint, find_checkpoint
from ultramem.runs.layout import TASKS_NAME
from ultramem.runs.results import TaskResult
from ultramem.runs.tokenizer import find_tokenizer


@dataclass(frozen=True)
class TaskEvaluation:
    """What a checkpoint achieves on tasks.

    Attributes:
        checkpoint: its name, such as `step600`.
        results: of the tasks, then the means of the groups that are complete.
        context_length: most tokens that the model read at once.
        tokens_per_second: how fast they were read, padding aside; not saved.
        run: the run directory; not saved.
        max_questions: as in `evaluate_tasks`.
    """

    checkpoint: str
    results: list[TaskResult]
    context_length: int
    tokens_per_second: float
    run: Path
    max_questions: int | None = None

    def save(self, path: Path | None = None) -> Path:
        """Write the results to a JSON file, by default the run's `tasks.json`, which `ultramem report` shows.

        What the run's file says about other tasks of the same checkpoint, asked in the same way, is kept.

        Raises:
            UltraMemError: the file cannot be written.
        """
        settings = {name: getattr(self, name) for name in ("checkpoint", "context_length", "max_questions")}
        earlier = _saved_results(self.run / TASKS_NAME, settings) if path is None else []
        new = {_task(result) for result in self.results}
        results = [*(result for result in earlier if _task(result) not in new), *self.results]
        tasks = [result for result in results if result.name not in GROUPS]
        path = path or self.run / TASKS_NAME
        write_json(path, {**settings, "results": [asdict(result) for result in with_means(tasks)]})
        return path


def evaluate_tasks(
    paths: Sequence[str | os.PathLike[str]],
    tasks: Sequence[str] = ("table3",),
    *,
    max_questions: int | None = None,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    device: str = "auto",
) -> Iterator[TaskEvaluation]:
    """Evaluate checkpoints one after the other, each with a progress bar on a terminal.

    Args:
        paths: run directories for their latest complete checkpoint, or checkpoints' own directories.
        tasks: names of tasks or groups of them; see `ultramem.evaluation.task_suite`.
        max_questions: of each task, spread evenly, or of each result of a memory task; always the same. None for all.
        batch_size: requests of full length at a time, by default about 8192 tokens; the result does not depend on it.
        sequence_length: most tokens that a model reads at once, by default that of its training. Longer contexts are
            cut on the left.
        device: `cpu`, `cuda` (in bfloat16 where it has that), or `auto` for CUDA where there is a device.

    Raises:
        ConfigError: a value is invalid.
        UltraMemError: a checkpoint, its tokenizer or a package is missing or damaged, or the output is not finite.
    """
    names = task_names(tasks)
    check_max_questions(max_questions)
    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}: must be at least 1")
    checkpoints = [find_checkpoint(path) for path in paths]
    tokenizers = [find_tokenizer(checkpoint) for checkpoint in checkpoints]
    suites: dict[tuple[str, int, int], TaskSuite] = {}
    for checkpoint, tokenizer in zip(checkpoints, tokenizers, strict=True):
        length = sequence_length or checkpoint.config.data.sequence_length
        key = tokenizer.tokenizer.to_str(), tokenizer.eos_token_id, length
        if key not in suites:
            suites = {key: TaskSuite(names, tokenizer, length, max_questions)}  # no more than one: they take memory
        batch_tokens = BATCH_TOKENS if batch_size is None else batch_size * length
        yield _evaluate(checkpoint, suites[key], batch_tokens, device)


def _evaluate(checkpoint: Checkpoint, suite: TaskSuite, batch_tokens: int, device: str) -> TaskEvaluation:
    model, tokens = checkpoint.load_model(device), suite.tokens()
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(f"{checkpoint.run.name}/{checkpoint.name}", total=tokens)
        started = time.perf_counter()
        results = suite.run(model, batch_tokens=batch_tokens, on_tokens=lambda count: progress.advance(bar, count))
        seconds = time.perf_counter() - started
    return TaskEvaluation(
        checkpoint.name, results, suite.context_length, tokens / seconds, checkpoint.run, suite.max_questions
    )


def print_task_table(evaluations: Sequence[TaskEvaluation]) -> None:
    """Print evaluations on the same tasks to the terminal, a column for each.

    Parts of tasks that are too long for some of the models are empty there.
    """
    names = column_names([(evaluation.run, evaluation.checkpoint) for evaluation in evaluations])
    table = Table("task", "questions", "chance", *names, title="percent ± standard error")
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    columns = [{result.name: result for result in evaluation.results} for evaluation in evaluations]
    tasks = {name: result for column in reversed(columns) for name, result in column.items()}
    for result in sorted(tasks.values(), key=lambda result: result.name in GROUPS):
        figures = (_figure(column.get(result.name)) for column in columns)
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
            limit = evaluation.context_length
            console.print(f"{name}: contexts cut on the left, to read {limit} tokens at most: {', '.join(cut)}")


def _figure(result: TaskResult | None) -> str:
    return "" if result is None else f"{100 * result.value:.1f} ± {100 * result.standard_error:.1f}"


def _task(result: TaskResult) -> str:
    """The task that the result is of, or of a part of which it is."""
    return result.name.partition("/")[0]


def _saved_results(path: Path, settings: Mapping[str, object]) -> list[TaskResult]:
    """What the file says if it was made with these settings; nothing where it cannot be understood."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        same = all(content[name] == value for name, value in settings.items())
        return [TaskResult.parse(result) for result in content["results"] if same]
    except (OSError, ValueError, TypeError, KeyError):
        return []
