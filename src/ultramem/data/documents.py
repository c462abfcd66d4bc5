"""Reading documents from text files, source trees, JSON lines and parquet.

At most one document, or one parquet row group, is in memory at a time. For a record that cannot be read, a
`BrokenRecordError` is yielded in its place, so that the caller decides whether to stop or to count it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet

from ultramem.configuration.field_types import shown
from ultramem.errors import ConfigError, UltraMemError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
JSON_LINES_SUFFIXES = {".json", ".jsonl", ".ndjson"}
CORPUS_PATTERNS = (
    *(name + compression for name in ("*.txt", "*.jsonl", "*.ndjson") for compression in ("", *COMPRESSIONS)),
    *("*.json" + compression for compression in COMPRESSIONS),
    "*.parquet",
)

LONGEST_TEXT = 2**20  # characters; a longer .txt file becomes several documents
BLOCK = 2**20  # characters read at a time


class BrokenRecordError(UltraMemError):
    """A record of the corpus that cannot be read. The message names the file, the line or row, and the reason."""


@dataclass(frozen=True)
class Document:
    """One document of a corpus.

    Attributes:
        text: the text, never empty, always encodable as UTF-8.
        name: the record's own `id` where it has one, else `source:location`.
        source: the file that it was read from, as the user named it.
        location: line of a JSON lines file, row of a parquet file or number within a text file, counted from 1.
        num_bytes: length of the text in UTF-8.
        digest: a hash of the text alone, so that copies of a document have the same one.
        position: bytes of the corpus on disk that had been read when the document was complete.
    """

    text: str
    name: str
    source: str
    location: int
    num_bytes: int
    digest: bytes
    position: int


@dataclass(frozen=True)
class SourceFile:
    """A file of the corpus, its size on disk in bytes, and the total size of the files before it."""

    path: Path
    num_bytes: int
    offset: int

    @property
    def compression(self) -> str | None:
        """The codec that the file's last suffix names, if any."""
        return COMPRESSIONS.get(self.path.suffix.lower())

    @property
    def suffix(self) -> str:
        """The suffix of the format, without that of the compression, in lower case."""
        path = self.path.with_suffix("") if self.compression else self.path
        return path.suffix.lower()


def parse_size(text: str, name: str = "max_size") -> int:
    """Parse a size such as `500000`, `2MB` (10⁶ bytes each) or `1.5GiB` (2³⁰ bytes each) into bytes.

    Raises ConfigError, which names the option `name`, if the text is not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?\s*", text, flags=re.IGNORECASE)
    number, prefix, binary = match.groups(default="") if match else ("0", "", "")
    size = float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix.lower() or " ")
    if not 1 <= size < 2**63:
        raise ConfigError(f"{name}={shown(text)}: must be a number of bytes or a size such as 2MB, 500MiB or 1.5GB")
    return int(size)


def find_sources(paths: Iterable[Path], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[SourceFile]:
    """Find the files at `paths`, each once: files in the given order, those of directories in sorted order.

    Args:
        paths: files, which may have any name, and directories, which are walked without hidden files and directories.
        include: shell patterns of the files to read from directories, matched against a file's name and its path
            below the directory. By default text, JSON lines and parquet files.
        exclude: shell patterns of files to leave out, matched likewise, also against files given by name.

    Raises:
        UltraMemError: a path does not exist, or no file is left.
    """
    found: dict[Path, SourceFile] = {}
    offset = 0
    for path in paths:
        if not path.absolute().name:
            raise UltraMemError(f"{path} is the whole file system; give files and directories in it")
        if path.is_dir():
            names = [name for name in _walk(path) if _matches(name, include or CORPUS_PATTERNS)]
            files = [path / name for name in names if not _matches(name, exclude)]
        elif path.exists() and not path.is_file():
            raise UltraMemError(f"{path} is neither a file nor a directory; give files that can be read again")
        elif path.exists():
            files = [] if _matches(path, exclude) else [path]
        else:
            raise UltraMemError(f"{path} does not exist; check the path")
        for file in files:
            if (real_path := Path(os.path.realpath(file))) not in found:
                found[real_path] = SourceFile(file, file.stat().st_size, offset)
                offset += file.stat().st_size
    if not found:
        patterns = ", ".join(include or CORPUS_PATTERNS)
        raise UltraMemError(
            f"no file to read in {', '.join(map(str, paths))} (looked for {patterns}); "
            "choose files with --include, such as --include '*.py'"
        )
    return list(found.values())


def check_include(paths: Iterable[Path], include: Sequence[str]) -> None:
    """Check that there is a directory for `include` to choose from.

    Raises:
        ConfigError: there is none.
    """
    if include and not any(path.is_dir() for path in paths):
        raise ConfigError(f"include={', '.join(include)}: applies to directories, and none is given; leave it out")


def read_documents(
    files: Iterable[SourceFile], text_field: str = "text", separator: str | None = None
) -> Iterator[Document | BrokenRecordError]:
    """Yield the documents of all files in order, and a `BrokenRecordError` for each one that cannot be read.

    Each parquet row and each line of JSON (`.jsonl`, `.ndjson`, `.json`, also compressed) is a document. Any other
    file is read as UTF-8 text and is one document, except for `.txt` files: they are cut at `separator`, and at line
    ends into documents of about a million characters, so that a corpus in a single file need not fit in memory.

    Args:
        files: what `find_sources` found.
        text_field: the field or column that holds the text.
        separator: separator between documents in `.txt` files, such as `<|endoftext|>`.
    """
    for file in files:
        try:
            if file.suffix == ".parquet":
                yield from _read_parquet(file, text_field)
            elif file.suffix in JSON_LINES_SUFFIXES:
                yield from _read_json_lines(file, text_field)
            else:
                yield from _read_text(file, separator)
        except OSError as error:
            yield BrokenRecordError(f"{file.path}: cannot be read: {error}")


def _walk(directory: Path) -> list[Path]:
    """Files below `directory`, relative to it, sorted; hidden ones left out."""
    found: list[Path] = []
    for root, directories, files in os.walk(directory):
        directories[:] = [name for name in directories if not name.startswith(".")]
        found += [Path(root, name).relative_to(directory) for name in files if not name.startswith(".")]
    return sorted(path for path in found if (directory / path).is_file())


def _matches(path: Path, patterns: Iterable[str]) -> bool:
    return any(fnmatch(path.name, pattern) or fnmatch(path.as_posix(), pattern) for pattern in patterns)


def _decompress(file: SourceFile, raw: BinaryIO) -> BinaryIO:
    """Open the uncompressed stream; unlike the readers of gzip and zstandard it reports every truncated stream."""
    if file.compression is None:
        return raw
    return io.BufferedReader(pa.CompressedInputStream(raw, file.compression))


def _document(
    text: object, file: SourceFile, location: int, position: int, name: object = None
) -> Document | BrokenRecordError:
    place = f"{file.path}:{location}"
    if not isinstance(text, str):
        return BrokenRecordError(f"{place}: the text is of type {type(text).__name__}, not a string")
    if not text:
        return BrokenRecordError(f"{place}: the text is empty")
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        return BrokenRecordError(f"{place}: the text is not valid Unicode: {error.reason}")
    return Document(
        text=text,
        name=place if name is None else str(name),
        source=str(file.path),
        location=location,
        num_bytes=len(encoded),
        digest=hashlib.blake2b(encoded, digest_size=16).digest(),
        position=file.offset + position,
    )


def _read_json_lines(file: SourceFile, text_field: str) -> Iterator[Document | BrokenRecordError]:
    number = 0
    with file.path.open("rb") as raw:
        try:
            for number, line in enumerate(_decompress(file, raw), start=1):
                if not line.isspace():
                    yield _parse_json_line(line, file, number, raw.tell(), text_field)
        except OSError as error:
            yield BrokenRecordError(f"{file.path}:{number + 1}: cannot be read from this line on: {error}")


def _parse_json_line(
    line: bytes, file: SourceFile, number: int, position: int, text_field: str
) -> Document | BrokenRecordError:
    place = f"{file.path}:{number}"
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        return BrokenRecordError(f"{place}: not UTF-8: {error.reason} at byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return BrokenRecordError(f"{place}: not valid JSON: {error}")
    if not isinstance(record, dict):
        return BrokenRecordError(f"{place}: not a JSON object but of type {type(record).__name__}")
    if text_field not in record:
        fields = ", ".join(map(repr, record)) or "none"
        return BrokenRecordError(f"{place}: has no field {text_field!r} (fields: {fields}); see --text-field")
    return _document(record[text_field], file, number, position, record.get("id"))


def _read_parquet(file: SourceFile, text_field: str) -> Iterator[Document | BrokenRecordError]:
    row = 0
    try:
        with pa.parquet.ParquetFile(file.path) as table:
            fields = table.schema_arrow.names
            if text_field not in fields:
                yield BrokenRecordError(
                    f"{file.path}: has no column {text_field!r} (columns: {', '.join(fields)}); see --text-field"
                )
                return
            rows = table.metadata.num_rows
            columns = [name for name in (text_field, "id") if name in fields]
            for batch in table.iter_batches(batch_size=256, columns=columns):
                for record in range(batch.num_rows):
                    row += 1
                    yield _parse_row(batch, record, file, row, file.num_bytes * row // rows, text_field)
    except (OSError, pa.ArrowException) as error:
        yield BrokenRecordError(f"{file.path}:{row + 1}: cannot be read from this row on: {error}")


def _parse_row(
    batch: pa.RecordBatch, record: int, file: SourceFile, row: int, position: int, text_field: str
) -> Document | BrokenRecordError:
    try:
        values = {name: batch[name][record].as_py() for name in batch.schema.names}
    except UnicodeDecodeError as error:
        return BrokenRecordError(f"{file.path}:{row}: not UTF-8: {error.reason}")
    return _document(values[text_field], file, row, position, values.get("id"))


def _read_text(file: SourceFile, separator: str | None) -> Iterator[Document | BrokenRecordError]:
    number = 0
    with file.path.open("rb") as raw:
        lines = io.TextIOWrapper(_decompress(file, raw), encoding="utf-8", newline="")
        texts = _cut(lines, separator) if file.suffix == ".txt" else iter(lines.read, "")
        try:
            for number, text in enumerate(texts, start=1):
                yield _document(text, file, number, raw.tell())
        except UnicodeDecodeError as error:
            yield BrokenRecordError(f"{file.path}:{_undecodable_line(file)}: not UTF-8: {error.reason}")
        except OSError as error:
            yield BrokenRecordError(f"{file.path}: cannot be read after {number} documents: {error}")
        else:
            if number == 0:
                yield BrokenRecordError(f"{file.path}: the file is empty")


def _cut(lines: io.TextIOWrapper, separator: str | None) -> Iterator[str]:
    """Texts between separators, and pieces of those that are longer than `LONGEST_TEXT`."""
    pending = ""
    while block := lines.read(BLOCK):
        pending += block
        if separator:
            *finished, pending = pending.split(separator)
            yield from filter(None, (text.strip("\n") for text in finished))
        while len(pending) > LONGEST_TEXT:
            cut = pending.rfind("\n", 0, LONGEST_TEXT) + 1 or LONGEST_TEXT
            yield pending[:cut]
            pending = pending[cut:]
    if last := pending.strip("\n") if separator else pending:
        yield last


def _undecodable_line(file: SourceFile) -> int:
    """Number of the first line that is not UTF-8."""
    with file.path.open("rb") as raw:
        for number, line in enumerate(_decompress(file, raw), start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    raise OSError(f"{file.path} changed while it was read")
