"""Which token files a checkpoint is evaluated on."""

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
        manifest: lists the split; None for files without.
    """

    name: str
    files: Sequence[Path]
    dtype: str
    manifest: Manifest | None = None

    def bits_per_byte(self, loss: float | None) -> float | None:
        """What a mean loss in nats per token is in bits per byte of the text; None where that is not known.

        The loss of end-of-text tokens counts towards the text, and tokens that were not predicted are taken to cost as
        much as the others.
        """
        if loss is None or self.manifest is None:
            return None
        split = self.manifest.split(self.name)
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
    """The data to evaluate a checkpoint on.

    Args:
        checkpoint: whose vocabulary must cover the data's.
        paths: a directory written by `ultramem tokenize`, or token files; by default what the run was trained with.
        split: `train` or `heldout`; without meaning for token files.
        dtype: of token files, `uint16` or `uint32`; by default that of the training's.

    Raises:
        ConfigError: `dtype` is neither of the two.
        UltraMemError: something is missing, damaged, or has too large a vocabulary.
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
                f"{vocab_size}; give data of the tokenizer that it was trained with"
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
                f"{checkpoint.run} was trained on token files, none of them named for split {split!r}; give --data"
            )
    check_token_files(paths, dtype, vocab_size)
    return EvaluationData(split, paths, dtype)
