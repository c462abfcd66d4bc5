"""Evaluating checkpoints on tasks."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ultramem.configuration.field_types import check_least
from ultramem.evaluation.scoring import BATCH_TOKENS
from ultramem.evaluation.task_suite import GROUPS, TaskSuite, task_names, with_means
from ultramem.files.whole_files import write_json
from ultramem.runs.checkpoints import Checkpoint, find_checkpoint
from ultramem.runs.layout import TASKS_NAME
from ultramem.runs.results import TaskResult
from ultramem.runs.tokenizer import find_tokenizer


@dataclass(frozen=True)
class TaskEvaluation:
    """Results of a checkpoint on tasks.

    Attributes:
        checkpoint: name of the checkpoint, such as `step600`.
        results: results of the tasks, then the means of complete groups.
        context_length: maximum number of tokens that the model read.
        tokens_per_second: tokens read per second, without padding; not saved.
        run: run directory; not saved.
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

        Results in the run's file for other tasks of the same checkpoint, with the same settings, are kept.

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
    """Evaluate checkpoints on tasks, each with a progress bar on a terminal.

    Args:
        paths: run directories, for their latest complete checkpoints, or checkpoints' own directories.
        tasks: names of tasks or groups of tasks; see `ultramem.evaluation.task_suite`.
        max_questions: maximum number of questions per task, spread evenly, or per part of a memory task; always the
            same questions. None for all.
        batch_size: full-length requests per batch, by default about 8192 tokens; does not change the result.
        sequence_length: maximum number of tokens that a model reads; by default that of training. Longer contexts are
            cut on the left.
        device: `cpu`, `cuda` (in bfloat16 if it has hardware support), or `auto` for CUDA if available.

    Raises:
        ConfigError: a value is invalid.
        UltraMemError: a checkpoint, its tokenizer or a package is missing or damaged, or the output is not finite.
    """
    names = task_names(tasks)
    check_least(1, max_questions=max_questions, batch_size=batch_size, sequence_length=sequence_length)
    checkpoints = [find_checkpoint(path) for path in paths]
    tokenizers = [find_tokenizer(checkpoint) for checkpoint in checkpoints]
    suites: dict[tuple[str, int, int], TaskSuite] = {}
    for checkpoint, tokenizer in zip(checkpoints, tokenizers, strict=True):
        length = sequence_length or checkpoint.config.data.sequence_length
        key = tokenizer.tokenizer.to_str(), tokenizer.eos_token_id, length
        if key not in suites:
            suites = {key: TaskSuite(names, tokenizer, length, max_questions)}  # only one, to save memory
        batch_tokens = BATCH_TOKENS if batch_size is None else batch_size * length
        yield _evaluate(checkpoint, suites[key], batch_tokens, device)


def _evaluate(checkpoint: Checkpoint, suite: TaskSuite, batch_tokens: int, device: str) -> TaskEvaluation:
    model, tokens = checkpoint.load_model(device), suite.tokens()
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    console.quiet = not console.is_terminal  # else it gets an empty line at the end
    with Progress(*columns, console=console, disable=console.quiet) as progress:
        bar = progress.add_task(f"{checkpoint.run.name}/{checkpoint.name}", total=tokens)
        started = time.perf_counter()
        results = suite.run(model, batch_tokens=batch_tokens, on_tokens=lambda count: progress.advance(bar, count))
        seconds = time.perf_counter() - started
    return TaskEvaluation(
        checkpoint.name, results, suite.context_length, tokens / seconds, checkpoint.run, suite.max_questions
    )


def _task(result: TaskResult) -> str:
    """Name of the task of a result, which may be that of a part."""
    return result.name.partition("/")[0]


def _saved_results(path: Path, settings: Mapping[str, object]) -> list[TaskResult]:
    """Results in a file if it has these settings; none if it is missing or not valid."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        same = all(content[name] == value for name, value in settings.items())
        return [TaskResult.parse(result) for result in content["results"] if same]
    except (OSError, ValueError, TypeError, KeyError):
        return []
