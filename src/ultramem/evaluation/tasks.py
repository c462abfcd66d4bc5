"""What a task is: requests to a model, and what it makes of the scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ultramem.evaluation.scoring import Request, Score
from ultramem.runs.results import TaskResult


class Task(Protocol):
    """A task for one tokenizer and context length."""

    @property
    def requests(self) -> Sequence[Request]:
        """What to score."""
        ...

    def results(self, scores: Sequence[Score]) -> list[TaskResult]:
        """Those of a model that gave these scores to the requests, in their order: of the task, and of its parts."""
        ...
