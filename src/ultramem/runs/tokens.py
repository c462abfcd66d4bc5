"""The token files of a run, and checks that they fit its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ultramem.data.token_files import Manifest, check_token_files, load_manifest
from ultramem.errors import UltraMemError
from ultramem.runs.config import DataConfig, RunConfig


@dataclass(frozen=True)
class TokenData:
    """Token files and what is known about them.

    Attributes:
        train: files to train on.
        heldout: files to evaluate on; may be none.
        dtype: `uint16` or `uint32`.
        vocab_size: one more than the largest token id.
        eos_token_id: the token that ends a document.
        train_bytes_per_token: UTF-8 bytes of text per training token; None if not known.
        heldout_bytes_per_token: UTF-8 bytes of text per held-out token; None if not known.
        tokenizer: the `tokenizer.json`, or None if not known.
        manifests: of the directories that the files are in, if they are not named one by one.
    """

    train: tuple[Path, ...]
    heldout: tuple[Path, ...]
    dtype: str
    vocab_size: int
    eos_token_id: int
    train_bytes_per_token: float | None = None
    heldout_bytes_per_token: float | None = None
    tokenizer: Path | None = None
    manifests: tuple[Manifest, ...] = ()


def open_token_data(config: DataConfig) -> TokenData:
    """Find the files of a configuration.

    Raises:
        UltraMemError: the directory or a file in it is missing, unreadable or of the wrong size.
    """
    if config.directory is None:
        assert config.dtype is not None
        assert config.vocab_size is not None
        assert config.eos_token_id is not None
        return TokenData(config.train_files, config.heldout_files, config.dtype, config.vocab_size, config.eos_token_id)
    manifest, *others = (load_manifest(directory) for directory in (config.directory, *config.more_directories))
    for other in others:
        if other.eos_token_id != manifest.eos_token_id or not _same_tokenizer(other, manifest):
            raise UltraMemError(
                f"data.more_directories: {other.directory} has another tokenizer than {manifest.directory}; tokenize "
                f"it again with --tokenizer {manifest.tokenizer_path}"
            )
    train, heldout = [part.split("train") for part in (manifest, *others)], manifest.splits["heldout"]
    return TokenData(
        tuple(path for split in train for path in split.paths),
        tuple(heldout.paths),
        manifest.dtype,
        manifest.vocab_size,
        manifest.eos_token_id,
        sum(split.bytes for split in train) / sum(split.tokens for split in train),
        heldout.bytes / heldout.tokens if heldout.tokens else None,
        manifest.tokenizer_path,
        (manifest, *others),
    )


def _same_tokenizer(first: Manifest, second: Manifest) -> bool:
    return first.tokenizer_path.read_bytes() == second.tokenizer_path.read_bytes()


def check_token_data(data: TokenData, config: RunConfig) -> None:
    """Check that the files can be read, fit the model and have enough tokens for a batch; contents are not compared.

    Raises:
        UltraMemError: a file is missing or damaged, the vocabulary is larger than the model's, or there are too few
            tokens.
    """
    if data.vocab_size > config.model.vocab_size:
        raise UltraMemError(
            f"model.vocab_size={config.model.vocab_size}: must be at least {data.vocab_size}, the vocabulary size of "
            "the data; raise it, or leave it out"
        )
    counts = check_token_files(data.train, data.dtype, data.vocab_size)
    if data.heldout:
        check_token_files(data.heldout, data.dtype, data.vocab_size)
    length = config.data.sequence_length
    usable = sum(count // length for count in counts) * length
    if usable < config.trainer.batch_size:
        raise UltraMemError(
            f"trainer.batch_size={config.trainer.batch_size}: must be at most {usable}, the tokens of the training "
            f"data in whole sequences of {length}; lower it or data.sequence_length, or tokenize more text"
        )
