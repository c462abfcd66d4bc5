"""Results in the run directory: losses in `evaluation.json`, tasks in `tasks.json`, metrics in `metrics.jsonl`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ultramem.configuration.field_types import LARGEST, check_range, check_types
from ultramem.files.json_files import parse_json, read_json_object


def may_replace(path: Path, checkpoint: str, complete: bool) -> bool:
    """Whether results may replace those in a run's file: on a part of the data, never those of the checkpoint on all.

    Args:
        path: `evaluation.json` or `tasks.json`.
        checkpoint: name of the checkpoint.
        complete: whether the results are on all tokens or questions.
    """
    earlier = read_json_object(path)
    # Tasks have a limit instead; version 0.1 does not say whether losses are on all tokens.
    earlier_complete = earlier.get("complete", earlier.get("max_questions") is None)
    return complete or earlier.get("checkpoint") != checkpoint or not earlier_complete


@dataclass(frozen=True)
class LossResult:
    """Results of a checkpoint on token files.

    Attributes:
        checkpoint: name of the checkpoint, such as `step600`.
        split: `train` or `heldout`, or `files` for token files that are not the run's own.
        tokens: number of predicted tokens.
        loss: mean cross-entropy in nats per token.
        perplexity: exp(loss).
        bits_per_byte: bits per byte of text, including the loss of end-of-text tokens; None without a manifest.
        unigram_bits_per_byte: bits per byte of the train split's unigram model, or None.
        complete: whether all tokens of the files were used.
        data: the directory or token files, if they are not the run's own.
    """

    checkpoint: str
    split: str
    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float | None
    unigram_bits_per_byte: float | None
    complete: bool = True  # version 0.1 does not say
    data: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "tokens", least=0)

    @property
    def of_run(self) -> bool:
        """Whether they are on the run's own held-out data, and not on any other."""
        return self.split == "heldout" and self.data is None


@dataclass(frozen=True)
class TaskResult:
    """Result of a model on a task, or on a part of one.

    Attributes:
        name: name of the task, of a part of it, such as `copying/length64`, or of a group of tasks for their mean.
        metric: name of the metric, such as `accuracy`.
        value: value of the metric, from 0 to 1.
        standard_error: standard error of the value, for questions drawn at random from many of their kind.
        questions: number of questions.
        chance: value of random guessing.
        cut: share of the requests whose context was too long for the model and was cut on the left.
    """

    name: str
    metric: str
    value: float
    standard_error: float
    questions: int
    chance: float
    cut: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "questions", least=0)


def parse_report(line: str) -> tuple[int, dict[str, float]] | None:
    """Step and metrics of one line of `metrics.jsonl`, NaN for what cannot be drawn; None if it is unreadable."""
    try:
        report = parse_json(line)
        step, metrics = report["step"], report["metrics"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if type(step) is not int or step < 0:
        return None
    numbers = {name: float(value) for name, value in metrics if type(value) in (int, float)}
    return step, {name: value if abs(value) <= LARGEST else math.nan for name, value in numbers.items()}


def holds_results(path: Path) -> bool:
    """Whether a file holds results of an evaluation."""
    content = read_json_object(path)
    return "checkpoint" in content and ("loss" in content or "results" in content)
