"""Token files to evaluate a checkpoint on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ultramem.data.token_files import Manifest, check_token_files, load_manifest
from ultramem.errors import UltraMemError
from ultramem.evaluation.unigram import unigram_loss
from ultramem.runs.checkpoints import Checkpoint


@dataclass(frozen=True)
class EvaluationData:
    """Token files to evaluate on.

    Attributes:
        name: `train` or `heldout`, or `files` for files that are not the run's own.
        files: token files.
        dtype: `uint16` or `uint32`.
        manifest: manifest that lists the files, or None.
    """

    name: str
    files: Sequence[Path]
    dtype: str
    manifest: Manifest | None = None

    def bits_per_byte(self, loss: float | None) -> float | None:
        """Convert a mean loss in nats per token to bits per byte of text; None if that has none, or no known number.

        The loss of end-of-text tokens counts as that of text. Tokens that were not predicted count with the mean loss.
        """
        if loss is None or self.manifest is None:
            return None
        split = self.manifest.split(self.name)
        if not split.bytes:
            return None
        return loss / math.log(2) * split.tokens / split.bytes

    def unigram_loss(self) -> float | None:
        """Loss of the train split's unigram model on all tokens, in nats per token; None without a manifest."""
        if self.manifest is None:
            return None
        train = self.manifest.split("train").paths
        return unigram_loss(train, self.files, self.dtype, self.manifest.vocab_size)


def find_data(
    checkpoint: Checkpoint, paths: Sequence[Path] = (), split: str = "heldout", dtype: str | None = None
) -> EvaluationData:
    """Find the data to evaluate a checkpoint on.

    Args:
        checkpoint: checkpoint, whose vocabulary must include that of the data.
        paths: a directory written by `ultramem tokenize`, or token files; by default the data of the run.
        split: `train` or `heldout`; not used for token files.
        dtype: dtype of token files, `uint16` or `uint32`; by default that of the run's data.

    Raises:
        ConfigError: `dtype` is invalid.
        UltraMemError: a file is missing or damaged, or the vocabulary is too large.
    """
    trained_on, vocab_size = checkpoint.config.data, checkpoint.config.model.vocab_size
    directory = trained_on.directory
    if paths:
        directory = paths[0] if paths[0].is_dir() else None
    if directory is not None:
        manifest = load_manifest(directory)
        if manifest.vocab_size > vocab_size:
            raise UltraMemError(
                f"{manifest.directory} has a vocabulary of {manifest.vocab_size} tokens, but the model's has "
                f"{vocab_size}; give data made with the tokenizer of its training"
            )
        return EvaluationData(split, manifest.split(split).paths, manifest.dtype, manifest)
    # The training's configuration has either a directory or a dtype.
    dtype = dtype or trained_on.dtype or load_manifest(cast(Path, trained_on.directory)).dtype
    if paths:
        split = "files"
    else:
        paths = {"train": trained_on.train_files, "heldout": trained_on.heldout_files}.get(split, ())
        if not paths:
            raise UltraMemError(
                f"{checkpoint.run} was trained on token files and has none for split {split!r}; give some with --data"
            )
    check_token_files(paths, dtype, vocab_size)
    return EvaluationData(split, paths, dtype)
