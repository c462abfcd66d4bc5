"""Tasks by name, and evaluating checkpoints on several of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import Protocol

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ultramem.configuration.decoding import decode
from ultramem.configuration.field_types import check_least
from ultramem.data.tokenizers import ChosenTokenizer
from ultramem.errors import ConfigError
from ultramem.evaluation import memory_tasks, table3
from ultramem.evaluation.scoring import BATCH_TOKENS, Request, Score, score
from ultramem.files.json_files import read_json_object
from ultramem.files.whole_files import write_json
from ultramem.hosts.olmo_core.model import MemoryTransformer
from ultramem.runs.checkpoints import Checkpoint, find_checkpoint
from ultramem.runs.layout import TASKS_NAME
from ultramem.runs.results import TaskResult, may_replace
from ultramem.runs.tokenizer import find_tokenizer

# Names of groups of tasks, whose mean is reported too.
GROUPS = {"table3": tuple(table3.LABELS), "memory": tuple(memory_tasks.QUESTIONS)}
TASKS = tuple(name for names in GROUPS.values() for name in names)


def task_names(given: Iterable[str]) -> list[str]:
    """Names of tasks from names of tasks and groups, which may be comma-separated.

    Raises ConfigError if a name is unknown, or there is none.
    """
    names = [name.strip() for text in given for name in text.split(",")]
    for name in names or [""]:
        if name not in TASKS and name not in GROUPS:
            raise ConfigError(f"tasks={name}: must be one of {', '.join([*GROUPS, *TASKS])}")
    return list(dict.fromkeys(task for name in names for task in GROUPS.get(name, (name,))))


class Task(Protocol):
    """A task for a tokenizer and context length."""

    @property
    def requests(self) -> Sequence[Request]:
        """Requests to score."""

    def results(self, scores: Sequence[Score]) -> list[TaskResult]:
        """Results of the task and its parts from the scores of the requests, in their order."""


class TaskSuite:
    """Several tasks, by name, for a tokenizer and the maximum number of tokens that the models read.

    A task has at most `max_questions` questions, spread evenly; a memory task at most so many in each part. Raises
    UltraMemError if a package for a task is not installed, or the context is too short for a task.
    """

    def __init__(
        self, names: Sequence[str], tokenizer: ChosenTokenizer, context_length: int, max_questions: int | None = None
    ) -> None:
        self.context_length, self.max_questions = context_length, max_questions
        self.tasks: list[Task] = [
            memory_tasks.load(name, tokenizer, context_length, max_questions)
            if name in memory_tasks.QUESTIONS
            else table3.load(name, tokenizer, max_questions)
            for name in names
        ]

    def tokens(self) -> int:
        """Number of tokens that a model reads."""
        return sum(len(request.input(self.context_length)) for task in self.tasks for request in task.requests)

    def run(
        self,
        model: MemoryTransformer,
        *,
        batch_tokens: int = BATCH_TOKENS,
        on_tokens: Callable[[int], object] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> list[TaskResult]:
        """Evaluate a model: the results of the tasks, then the means of complete groups.

        Arguments and errors are those of `score`.
        """
        requests = [request for task in self.tasks for request in task.requests]
        length = self.context_length
        scores = score(
            model, requests, context_length=length, batch_tokens=batch_tokens, on_tokens=on_tokens, group=group
        )
        remaining, results = iter(scores), []
        for task in self.tasks:
            cut = fmean(len(r.input()) > len(r.input(length)) for r in task.requests)
            found = task.results(list(islice(remaining, len(task.requests))))
            results += [replace(result, cut=cut) for result in found]
        return with_means(results)


def with_means(results: Sequence[TaskResult]) -> list[TaskResult]:
    """Results of tasks, followed by the means of complete groups."""
    by_name = {result.name: result for result in results}
    complete = {group: names for group, names in GROUPS.items() if by_name.keys() >= set(names)}
    return [*results, *(_mean(group, [by_name[name] for name in names]) for group, names in complete.items())]


@dataclass(frozen=True)
class TaskEvaluation:
    """Results of a checkpoint on tasks, then the means of complete groups.

    `context_length` is the maximum number of tokens that the model read, `max_questions` that of `evaluate_tasks`. Not
    saved are the tokens read per second, without padding, and the run directory.
    """

    checkpoint: str
    results: list[TaskResult]
    context_length: int
    tokens_per_second: float
    run: Path
    max_questions: int | None = None

    def save(self, path: Path | None = None) -> Path | None:
        """Write the results to a JSON file, by default the run's `tasks.json`, which `ultramem report` shows.

        Results in the run's file for other tasks of the same checkpoint, with the same settings, are kept. Nothing is
        written, and None returned, if it has the checkpoint on all questions, and these results are on some of them.
        Raises UltraMemError if the file cannot be written.
        """
        if path is None and not may_replace(self.run / TASKS_NAME, self.checkpoint, self.max_questions is None):
            return None
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
        tasks: names of tasks or groups of tasks; see `ultramem.evaluation.tasks`.
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
        content = read_json_object(path)
        same = all(content[name] == value for name, value in settings.items())
        return [decode(TaskResult, result) for result in content["results"] if same]
    except (ValueError, TypeError, KeyError):
        return []


def _mean(name: str, members: Sequence[TaskResult]) -> TaskResult:
    return TaskResult(
        name=name,
        metric="mean",
        value=fmean(result.value for result in members),
        standard_error=sqrt(sum(result.standard_error**2 for result in members)) / len(members),
        questions=sum(result.questions for result in members),
        chance=fmean(result.chance for result in members),
        cut=fmean(result.cut for result in members),
    )
