"""The configuration of fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ultramem.configuration.field_types import check_range, check_types
from ultramem.errors import ConfigError
from ultramem.hosts.transformers.sparse_finetuning import OptimizerKind

Method = Literal["sparse", "full", "lora"]
LEARNING_RATES = {
    "sparse": {"sgd": 100.0, "adamw": 3e-3},
    "full": {"sgd": 1e-2, "adamw": 1e-4},
    "lora": {"sgd": 1e-1, "adamw": 1e-3},
}


@dataclass(frozen=True)
class FinetuneConfig:
    """The configuration of fine-tuning.

    Attributes:
        model: transformers directory with model and tokenizer.
        data: files or directories of documents to learn.
        output: directory to write. It appears only when complete.
        memory: directory written by `save_memory`, whose memory is attached to a model without one.
        background: documents that the model must not forget, for method `sparse` to compare with; for it only.
        heldout: documents, other than the background, whose loss shows what was forgotten.
        text_field: field or column that holds the text.
        include: shell patterns of the files to read from directories, such as `*.py`.
        method: `sparse` (arXiv:2510.15103), `full` or `lora` (arXiv:2106.09685).
        rows: maximum number of rows of each table to train per step of method `sparse`.
        rank: rank of the LoRA matrices.
        steps: number of optimizer steps.
        epochs: number of passes over the data, instead of `steps`; by default 1.
        batch_size: sequences per step.
        sequence_length: maximum number of tokens per sequence; longer documents are cut.
        learning_rate: constant learning rate; the default depends on method and optimizer.
        optimizer: `sgd` or `adamw`. For `sparse` the paper prefers SGD, whose best learning rate depends more on the
            model.
        background_batches: maximum number of batches of the background to read.
        seed: seed for the order of the data and LoRA's initial values.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        ConfigError: a value is invalid.
    """

    model: Path
    data: tuple[Path, ...]
    output: Path
    memory: Path | None = None
    background: tuple[Path, ...] = ()
    heldout: tuple[Path, ...] = ()
    text_field: str = "text"
    include: tuple[str, ...] = ()
    method: Method = "sparse"
    rows: int = 4096
    rank: int = 8
    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 32
    sequence_length: int = 256
    learning_rate: float | None = None
    optimizer: OptimizerKind = "adamw"
    background_batches: int = 1000
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        check_types(self)
        counts = ("rows", "rank", "steps", "epochs", "batch_size", "background_batches")
        check_range(self, *counts, least=1, most=2**31 - 1)
        check_range(self, "sequence_length", least=2, most=2**31 - 1)
        check_range(self, "learning_rate", above=0)
        check_range(self, "seed", least=0, below=2**32)
        if self.steps and self.epochs:
            raise ConfigError(f"steps={self.steps}: must not be given with epochs={self.epochs}; leave out one of them")
        if self.method == "sparse" and not self.background:
            raise ConfigError("method=sparse: needs a background; give documents of what the model knows")
        if self.method != "sparse" and self.background:
            given = ", ".join(map(str, self.background))
            raise ConfigError(
                f"background={given}: method={self.method} does not use it; leave it out, or choose method=sparse"
            )

    @property
    def chosen_learning_rate(self) -> float:
        """The learning rate, or the default for method and optimizer."""
        return self.learning_rate or LEARNING_RATES[self.method][self.optimizer]
