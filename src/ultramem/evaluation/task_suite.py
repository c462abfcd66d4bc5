"""Tasks by name, and results of a model on several of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from math import sqrt
from statistics import fmean
from typing import Protocol

import torch.distributed as dist

from ultramem.data.tokenizers import ChosenTokenizer
from ultramem.errors import ConfigError
from ultramem.evaluation import memory_tasks, table3
from ultramem.evaluation.scoring import BATCH_TOKENS, Request, Score, score
from ultramem.hosts.olmo_core.model import MemoryTransformer
from ultramem.runs.results import TaskResult

# Names of groups of tasks, whose mean is reported too.
GROUPS = {"table3": tuple(table3.LABELS), "memory": tuple(memory_tasks.QUESTIONS)}
TASKS = tuple(name for names in GROUPS.values() for name in names)


def task_names(given: Iterable[str]) -> list[str]:
    """Names of tasks from names of tasks and groups, which may be comma-separated.

    Raises:
        ConfigError: a name is unknown, or there is none.
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
        ...

    def results(self, scores: Sequence[Score]) -> list[TaskResult]:
        """Results of the task and its parts from the scores of the requests, in their order."""
        ...


class TaskSuite:
    """Several tasks for a tokenizer and context length.

    Args:
        names: names of tasks, as from `task_names`.
        tokenizer: tokenizer of the models.
        context_length: maximum number of tokens that the models read.
        max_questions: maximum number of questions per task, spread evenly, or per part of a memory task; None for all.

    Raises:
        UltraMemError: a package for a task is not installed, or the context is too short for a task.
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

        Args:
            model, batch_tokens, on_tokens, group: as in `score`.

        Raises:
            UltraMemError: the model's output is not finite.
        """
        requests = [request for task in self.tasks for request in task.requests]
        scores = iter(
            score(
                model,
                requests,
                context_length=self.context_length,
                batch_tokens=batch_tokens,
                on_tokens=on_tokens,
                group=group,
            )
        )
        results = []
        for task in self.tasks:
            cut = fmean(len(r.input()) > len(r.input(self.context_length)) for r in task.requests)
            found = task.results(list(islice(scores, len(task.requests))))
            results += [replace(result, cut=cut) for result in found]
        return with_means(results)


def with_means(results: Sequence[TaskResult]) -> list[TaskResult]:
    """Results of tasks, followed by the means of complete groups."""
    by_name = {result.name: result for result in results}
    complete = {group: names for group, names in GROUPS.items() if by_name.keys() >= set(names)}
    return [*results, *(_mean(group, [by_name[name] for name in names]) for group, names in complete.items())]


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
