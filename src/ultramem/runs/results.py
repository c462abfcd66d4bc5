"""What evaluations leave in the run directory: losses in `evaluation.json`, results of tasks in `tasks.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LossResult:
    """What a checkpoint achieves on token files.

    Attributes:
        checkpoint: its name, such as `step600`.
        split: `train` or `heldout`, or `files` for token files that are not the run's own.
        tokens: how many were predicted.
        loss: mean cross-entropy in nats per token.
        perplexity: exp(loss).
        bits_per_byte: of text, the end-of-text tokens' loss included; None for files without a manifest.
        unigram_bits_per_byte: the same of the train split's unigram model, or None.
    """

    checkpoint: str
    split: str
    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float | None
    unigram_bits_per_byte: float | None

    @staticmethod
    def parse(content: dict[str, Any]) -> LossResult:
        """Pick the fields out of the file's content."""
        bits, unigram = content.get("bits_per_byte"), content.get("unigram_bits_per_byte")
        return LossResult(
            checkpoint=str(content["checkpoint"]),
            split=str(content["split"]),
            tokens=int(content["tokens"]),
            loss=float(content["loss"]),
            perplexity=float(content["perplexity"]),
            bits_per_byte=None if bits is None else float(bits),
            unigram_bits_per_byte=None if unigram is None else float(unigram),
        )


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

    @staticmethod
    def parse(content: dict[str, Any]) -> TaskResult:
        """Pick the fields out of one result of the file."""
        shares = {name: float(content[name]) for name in ("value", "standard_error", "chance", "cut")}
        return TaskResult(
            name=str(content["name"]), metric=str(content["metric"]), questions=int(content["questions"]), **shares
        )
