"""The interface of tasks: requests to a model, and results from their scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ultramem.evaluation.scoring import Request, Score
from ultramem.runs.results import TaskResult


class Task(Protocol):
    """A task for a tokenizer and context length."""

    @property
    def requests(self) -> Sequence[Request]:
        """Requests to score."""
        ...

    def results(self, scores: Sequence[Score]) -> list[TaskResult]:
        """Results of the task and its parts from the scores of the requests, in their order."""
        ...
