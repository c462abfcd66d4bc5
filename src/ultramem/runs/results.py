"""Results of evaluations in the run directory: losses in `evaluation.json`, tasks in `tasks.json`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultramem.files.whole_files import read_json_object


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
    """

    checkpoint: str
    split: str
    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float | None
    unigram_bits_per_byte: float | None
    complete: bool = True

    @staticmethod
    def parse(content: dict[str, Any]) -> LossResult:
        """Parse the content of the file."""
        bits, unigram = content.get("bits_per_byte"), content.get("unigram_bits_per_byte")
        return LossResult(
            checkpoint=str(content["checkpoint"]),
            split=str(content["split"]),
            tokens=int(content["tokens"]),
            loss=float(content["loss"]),
            perplexity=float(content["perplexity"]),
            bits_per_byte=None if bits is None else float(bits),
            unigram_bits_per_byte=None if unigram is None else float(unigram),
            complete=bool(content.get("complete", True)),  # version 0.1 does not say
        )


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

    @staticmethod
    def parse(content: dict[str, Any]) -> TaskResult:
        """Parse one result of the file."""
        shares = {name: float(content[name]) for name in ("value", "standard_error", "chance", "cut")}
        return TaskResult(
            name=str(content["name"]), metric=str(content["metric"]), questions=int(content["questions"]), **shares
        )


def holds_results(path: Path) -> bool:
    """Whether a file holds results of an evaluation."""
    content = read_json_object(path)
    return "checkpoint" in content and ("loss" in content or "results" in content)
