"""Token files to evaluate a checkpoint on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ultramem.data.token_files import Manifest, check_token_files, load_manifest
from ultramem.errors import ConfigError, UltraMemError
from ultramem.runs.checkpoints import Checkpoint
from ultramem.runs.config import DataConfig
from ultramem.runs.contents import (
    DataContents,
    FileContent,
    check_same_files,
    file_content,
    recorded_contents,
    token_contents,
)
from ultramem.runs.layout import TOKENIZER_NAME
from ultramem.runs.tokens import open_token_data


@dataclass(frozen=True)
class EvaluationData:
    """Token files to evaluate on.

    Attributes:
        name: `train` or `heldout`, or `files` for files that are not the run's own.
        files: token files.
        dtype: `uint16` or `uint32`.
        manifest: manifest that lists the files, or None.
        other: the directory or files as text, if they are not the run's own.
        verify: whether files are compared with their checksums before they are read.
    """

    name: str
    files: Sequence[Path]
    dtype: str
    manifest: Manifest | None = None
    other: str | None = None
    verify: bool = True

    def bits_per_byte(self, loss: float) -> float | None:
        """Convert a mean loss in nats per token to bits per byte of text; None if that has none, or no known number.

        The loss of end-of-text tokens counts as that of text. Tokens that were not predicted count with the mean loss.
        """
        if self.manifest is None:
            return None
        split = self.manifest.split(self.name)
        if not split.bytes:
            return None
        return loss / math.log(2) * split.tokens / split.bytes


def find_data(
    checkpoint: Checkpoint, paths: Sequence[Path] = (), split: str | None = None, dtype: str | None = None
) -> EvaluationData:
    """Find the data to evaluate a checkpoint on.

    Args:
        checkpoint: checkpoint, whose vocabulary must include that of the data.
        paths: a directory written by `ultramem tokenize`, or token files; by default the data of the run.
        split: `train` or `heldout`, by default the latter; not for given token files.
        dtype: dtype of given token files, `uint16` or `uint32`; by default that of the run's data.

    Raises:
        ConfigError: `dtype` is invalid, or a value does not apply to the data.
        UltraMemError: a file is missing or damaged, the vocabulary is too large, the tokenizer is not the run's, or the
            run's own data has changed.
    """
    run, recorded = checkpoint.config.data, recorded_contents(checkpoint.run)
    directory = next((path for path in paths if path.is_dir()), None) if paths else run.directory
    _check_applicable(paths, directory, split, dtype)
    split, manifest = split or "heldout", None
    if directory is not None:
        manifest = load_manifest(directory)
        _check_tokenizer(checkpoint, manifest, recorded)
        files, dtype = manifest.split(split).paths, manifest.dtype
    elif paths:
        # The training's configuration has either a directory or a dtype.
        files, dtype = list(paths), dtype or run.dtype or load_manifest(cast(Path, run.directory)).dtype
    else:
        files, dtype = (
            list({"train": run.train_files, "heldout": run.heldout_files}.get(split, ())),
            cast(str, run.dtype),
        )
        if not files:
            raise UltraMemError(
                f"{checkpoint.run} was trained on token files and has none for split {split!r}; give some with --data"
            )
    check_token_files(files, dtype, checkpoint.config.model.vocab_size)
    contents = token_contents(files, () if manifest is None else (manifest,), run.verify)
    if not paths:
        if recorded is not None:
            # Of several directories, only the first is evaluated on.
            earlier = getattr(recorded, split)[: len(files) if run.more_directories else None]
            check_same_files(files, contents, earlier, split)
        return EvaluationData(split, files, dtype, manifest, verify=run.verify)
    other = None if manifest is not None and _is_own(run, recorded, contents, split) else ", ".join(map(str, paths))
    return EvaluationData("files" if manifest is None else split, files, dtype, manifest, other, run.verify)


def _check_applicable(paths: Sequence[Path], directory: Path | None, split: str | None, dtype: str | None) -> None:
    if directory is not None and len(paths) > 1:
        raise ConfigError(f"data={', '.join(map(str, paths))}: must be one directory, or token files")
    if dtype is not None and (directory is not None or not paths):
        raise ConfigError(f"dtype={dtype}: applies only to token files given as data; leave it out")
    if split is not None and paths and directory is None:
        raise ConfigError(f"split={split}: does not apply to token files given as data; leave it out")


def _check_tokenizer(checkpoint: Checkpoint, manifest: Manifest, recorded: DataContents | None) -> None:
    vocab_size, own = checkpoint.config.model.vocab_size, checkpoint.run / TOKENIZER_NAME
    if manifest.vocab_size > vocab_size:
        raise UltraMemError(
            f"{manifest.directory} has a vocabulary of {manifest.vocab_size} tokens, but the model's has "
            f"{vocab_size}; give data made with the tokenizer of its training"
        )
    expected = None if recorded is None else recorded.tokenizer
    if expected is None and own.is_file():
        expected = file_content(own)
    if expected is not None and not file_content(manifest.tokenizer_path).is_like(expected):
        raise UltraMemError(
            f"{manifest.directory} was made with another tokenizer than the data of {checkpoint.run}, so its tokens "
            f"mean something else; tokenize its text again with --tokenizer {own}"
        )


def _is_own(config: DataConfig, recorded: DataContents | None, contents: Sequence[FileContent], split: str) -> bool:
    """Whether files that were given are known to be those of a run, by their contents."""
    if recorded is not None:
        expected = getattr(recorded, split)
    else:  # of version 0.1
        try:
            data = open_token_data(config)
            expected = token_contents(getattr(data, split), data.manifests, config.verify)
        except UltraMemError:
            return False  # it has moved
    return len(contents) == len(expected) and all(
        new.bytes == old.bytes and new.crc32 == old.crc32 is not None
        for new, old in zip(contents, expected, strict=True)
    )
