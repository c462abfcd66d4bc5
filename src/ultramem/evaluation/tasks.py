"""What a task is: requests to a model, and what it makes of the scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ultramem.evaluation.scoring import Request, Score


@dataclass(frozen=True)
class TaskResult:
    """How well a model does a task, or a part of one.

    Attributes:
        name: of the task, followed by that of the part, such as `copying/length64`; of a group of tasks for their mean.
        metric: what is measured, such as `accuracy`.
        value: the metric, a share from 0 to 1.
        standard_error: of the value, had the questions been drawn at random from many of their kind.
        questions: how many were asked.
        chance: the value of guessing.
        cut: share of the requests whose context was longer than what the model reads, and was cut on the left.
    """

    name: str
    metric: str
    value: float
    standard_error: float
    questions: int
    chance: float
    cut: float = 0.0


class Task(Protocol):
    """A task for one tokenizer and context length."""

    @property
    def requests(self) -> Sequence[Request]:
        """What to score."""
        ...

    def results(self, scores: Sequence[Score]) -> list[TaskResult]:
        """Those of a model that gave these scores to the requests, in their order: of the task, and of its parts."""
        ...
