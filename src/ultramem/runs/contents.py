"""What a run's data is: sizes and checksums of its files, which `summary.json` keeps from the run's start."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultramem.configuration.field_types import check_types
from ultramem.data.token_files import Manifest, check_token_files
from ultramem.errors import UltraMemError, system_reason
from ultramem.files.checksums import Checksums
from ultramem.runs.layout import SUMMARY_NAME
from ultramem.runs.summary import DATA, read_summary
from ultramem.runs.tokens import TokenData


@dataclass(frozen=True)
class FileContent:
    """Name, bytes and CRC-32 of a file; the last is None if it is not known."""

    file: str
    bytes: int
    crc32: str | None

    def __post_init__(self) -> None:
        check_types(self)

    def is_like(self, other: FileContent) -> bool:
        """Whether both have the same content, as far as it is known."""
        return self.bytes == other.bytes and (self.crc32 == other.crc32 or None in (self.crc32, other.crc32))


@dataclass(frozen=True)
class DataContents:
    """The files of a run's data.

    Attributes:
        train: token files to train on, in order.
        heldout: token files to evaluate on, in order.
        tokenizer: the `tokenizer.json`, or None if not known.
    """

    train: tuple[FileContent, ...]
    heldout: tuple[FileContent, ...]
    tokenizer: FileContent | None

    @staticmethod
    def of(data: TokenData, verify: bool) -> DataContents:
        """Find the contents of data.

        Args:
            data: token files.
            verify: whether to read all files, compare them with their checksums if there are any, and check all ids.
                Otherwise the checksums are believed, and are None where there are none.

        Raises:
            UltraMemError: a file is damaged or cannot be read, or has too large an id.
        """
        paths = (*data.train, *data.heldout)
        files = token_contents(paths, data.manifests, verify)
        if verify:
            check_token_files(paths, data.dtype, data.vocab_size, every_id=True)
        train, heldout = files[: len(data.train)], files[len(data.train) :]
        return DataContents(train, heldout, None if data.tokenizer is None else file_content(data.tokenizer))

    def check_same(self, data: TokenData, earlier: DataContents) -> None:
        """Check that data, whose contents these are, is what a run began with, wherever it is now.

        Raises:
            UltraMemError: it is not; the error names the file.
        """
        for split in ("train", "heldout"):
            check_same_files(getattr(data, split), getattr(self, split), getattr(earlier, split), split)
        if self.tokenizer and earlier.tokenizer and not self.tokenizer.is_like(earlier.tokenizer):
            raise UltraMemError(f"{data.tokenizer} {_CHANGED}")


_CHANGED = "has changed since the run began; restore it, or start another run"


def check_same_files(
    paths: Sequence[Path], found: Sequence[FileContent], earlier: Sequence[FileContent], split: str
) -> None:
    """Check that token files are those that a run began with.

    Raises:
        UltraMemError: there are more or fewer, or one has another content.
    """
    if len(found) != len(earlier):
        raise UltraMemError(
            f"the run began with {len(earlier)} {split} files and there are {len(found)} now; restore them, or start "
            "another run"
        )
    for path, new, old in zip(paths, found, earlier, strict=True):
        if not new.is_like(old):
            raise UltraMemError(f"{path} {_CHANGED}")


def token_contents(paths: Sequence[Path], manifests: Iterable[Manifest], verify: bool) -> tuple[FileContent, ...]:
    """Contents of token files, which these directories may list; `verify` as in `DataContents.of`.

    Raises:
        UltraMemError: a file is damaged or cannot be read.
    """
    known: dict[Path, int] = {}
    for manifest in manifests:
        known |= manifest.checksums()
        if verify:
            manifest.check(paths)
    try:
        if verify:
            unknown = {str(path.absolute()): path for path in paths if path not in known}
            computed = Checksums.compute(Path(), unknown).files
            known |= {path: computed[name][0][1] for name, path in unknown.items()}
        return tuple(FileContent(path.name, path.stat().st_size, _text(known.get(path))) for path in paths)
    except OSError as error:
        raise UltraMemError(f"{error.filename} cannot be read ({system_reason(error)}); check the file") from error


def file_content(path: Path) -> FileContent:
    """Content of a small file, which is read.

    Raises:
        UltraMemError: it cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UltraMemError(f"{path} cannot be read ({system_reason(error)}); check the file") from error
    return FileContent(path.name, len(content), _text(zlib.crc32(content)))


def recorded_contents(run: Path) -> DataContents | None:
    """What a run recorded at its start; None for one that version 0.1 began.

    Raises:
        UltraMemError: the record cannot be understood.
    """
    content: Any = read_summary(run).get(DATA)
    if content is None:
        return None
    try:
        train, heldout = (tuple(FileContent(**file) for file in content[split]) for split in ("train", "heldout"))
        tokenizer = content["tokenizer"]
        return DataContents(train, heldout, None if tokenizer is None else FileContent(**tokenizer))
    except (ValueError, KeyError, TypeError) as error:
        raise UltraMemError(
            f"{run / SUMMARY_NAME} is damaged: {DATA} cannot be understood; restore it, or remove {DATA} from it"
        ) from error


def _text(crc: int | None) -> str | None:
    return None if crc is None else f"{crc:08x}"
