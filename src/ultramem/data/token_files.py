"""Token files, which training and evaluation read, and the manifest that describes them.

Token files have the format that `dolma tokens` writes and OLMo-core reads: a headerless little-endian array of
unsigned integers (`.npy` in name only), with the boundaries of its documents in a `.csv.gz` beside it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ultramem.configuration.field_types import check_field, check_range, check_types
from ultramem.data.documents import Document
from ultramem.errors import ConfigError, UltraMemError
from ultramem.files.checksums import Checksums, check_files
from ultramem.files.directories import Product
from ultramem.files.json_files import damaged, path_inside, read_json, read_json_object
from ultramem.files.whole_files import write_text

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
FORMAT_VERSION = 1
ITEM_SIZES = {"uint16": 2, "uint32": 4}
COUNTS = ("documents", "tokens", "bytes")
SAMPLED_BLOCKS, SAMPLED_TOKENS = 16, 2**16
_REMEDY = "copy it again, or tokenize again with --overwrite"
TOKEN_DIRECTORY = Product(
    MANIFEST_NAME,
    lambda directory: read_json_object(directory / MANIFEST_NAME).keys() >= {"format_version", "dtype", "splits"},
    re.compile(r"manifest\.json|tokenizer\.json|(train|heldout)/(part-[0-9]{5,}\.(npy|csv\.gz))?"),
)


@dataclass(frozen=True)
class TokenFile:
    """A token file: its absolute path and how many documents, tokens and UTF-8 bytes of text it holds.

    Tokens include the end-of-text token of every document; bytes are those of the text alone.
    """

    path: Path
    documents: int
    tokens: int
    bytes: int

    @property
    def boundaries(self) -> Path:
        """The `.csv.gz` with the documents' start, end, id, source file and place in it."""
        return self.path.with_suffix(".csv.gz")


@dataclass(frozen=True)
class Split:
    """The token files of one split, `train` or `heldout`."""

    name: str
    files: tuple[TokenFile, ...]

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def paths(self) -> list[Path]:
        """Absolute paths of the token files, in order."""
        return [file.path for file in self.files]

    @property
    def documents(self) -> int:
        """Documents in all files."""
        return sum(file.documents for file in self.files)

    @property
    def tokens(self) -> int:
        """Tokens in all files, end-of-text tokens included."""
        return sum(file.tokens for file in self.files)

    @property
    def bytes(self) -> int:
        """Bytes of UTF-8 text in all files: the denominator of bits per byte."""
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True)
class Manifest:
    """Contents of a directory written by `ultramem tokenize`.

    Attributes:
        directory: absolute path of the directory.
        splits: `train` and `heldout`; the latter may be empty.
        dtype: `uint16` or `uint32`.
        vocab_size: one more than the largest id of the tokenizer.
        eos_token_id: id of the token that ends every document. Text that spells out a special token is ordinary text.
        pad_token_id: the tokenizer's padding id.
        tokenizer: name of the tokenizer; its file is `tokenizer_path`.
        seed: seed for the choice of held-out documents.
        near_duplicates: number of documents left out because they resemble an earlier one.
        skipped: number of broken records left out.
        skipped_examples: error messages of the first of them.
        sources: the given `paths`, the number of `files` found there, and their `bytes` on disk.
        arguments: other arguments of the run.
    """

    directory: Path
    splits: Mapping[str, Split]
    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    eos_token_id: int
    pad_token_id: int
    tokenizer: str
    seed: int
    near_duplicates: int = 0
    skipped: int = 0
    skipped_examples: tuple[str, ...] = ()
    sources: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(self)
        check_field(self, "splits", self.splits.keys() == {"train", "heldout"}, "train and heldout")
        for split in self.splits.values():
            for file in split.files:
                check_types(file)  # not by itself: a writer makes a new one for each document
                check_range(file, "documents", "bytes", least=0)
                check_range(file, "tokens", least=1)
        check_range(self, "vocab_size", least=1, most=256 ** ITEM_SIZES[self.dtype])
        check_range(self, "eos_token_id", "pad_token_id", least=0, below=self.vocab_size)
        check_range(self, "seed", "near_duplicates", "skipped", least=0)

    @property
    def tokenizer_path(self) -> Path:
        """The `tokenizer.json` that the tokens were made with."""
        return self.directory / TOKENIZER_NAME

    def split(self, name: str) -> Split:
        """The split of that name. Raises UltraMemError if there is none, or it has no documents."""
        if name not in self.splits:
            raise UltraMemError(f"{self.directory} has no split {name!r}; choose one of {', '.join(self.splits)}")
        if not self.splits[name].files:
            raise UltraMemError(
                f"split {name!r} of {self.directory} has no documents; "
                "run `ultramem tokenize` again with another --heldout or --seed"
            )
        return self.splits[name]

    def check(self, paths: Iterable[Path]) -> None:
        """Read those of its token files and their boundaries, and compare them with their checksums, if it has any.

        Raises:
            UltraMemError: a file is missing or damaged, or cannot be read.
        """
        check_files(self.directory, self._names({*paths}), _REMEDY)

    def checksums(self) -> dict[Path, int]:
        """CRC-32 by token file, as `checksums.json` has it; empty without one, as of version 0.1."""
        known = Checksums.load(self.directory)
        files = known.files if known else {}
        return {self.directory / name: pieces[0][1] for name, pieces in files.items() if len(pieces) == 1}

    def save_checksums(self) -> None:
        """Write `checksums.json` for all files of the directory.

        Raises:
            OSError: a file cannot be read, or it cannot be written.
        """
        Checksums.compute(self.directory, [MANIFEST_NAME, TOKENIZER_NAME, *self._names()]).save()

    def _names(self, paths: Container[Path] | None = None) -> list[str]:
        """Token files, all or some, and their boundaries, as paths in the directory."""
        files = [file for split in self.splits.values() for file in split.files if paths is None or file.path in paths]
        both = [path for file in files for path in (file.path, file.boundaries)]
        return [path.relative_to(self.directory).as_posix() for path in both]


_MANIFEST_VALUES = [field.name for field in fields(Manifest) if field.name not in ("directory", "splits")]


class SplitWriter:
    """Writes the documents of a split to `part-00000.npy` and so on in a directory, created with the first document.

    Documents are not divided between files, so one longer than `shard_tokens` makes a longer file.
    """

    def __init__(self, directory: Path, shard_tokens: int) -> None:
        self.directory = directory
        self.shard_tokens = shard_tokens
        self._files: list[TokenFile] = []
        self._open_files = ExitStack()

    def write(self, document: Document, tokens: np.ndarray) -> None:
        """Append a document: `tokens` (n,), little-endian, including the end-of-text token."""
        if not self._files or self._files[-1].tokens + len(tokens) > self.shard_tokens:
            self._start_file()
        file = self._files[-1]
        end = file.tokens + len(tokens)
        self._tokens.write(tokens.data)
        # OLMo-core reads the table line by line.
        name, source = (text.replace("\n", "\\n").replace("\r", "\\r") for text in (document.name, document.source))
        self._boundaries.writerow([file.tokens, end, name, source, document.location])
        self._files[-1] = replace(file, documents=file.documents + 1, tokens=end, bytes=file.bytes + document.num_bytes)

    def finish(self) -> Split:
        """Close the files and return what they hold."""
        self._open_files.close()
        return Split(self.directory.name, tuple(self._files))

    def _start_file(self) -> None:
        self._open_files.close()
        self.directory.mkdir(exist_ok=True)
        file = TokenFile(self.directory / f"part-{len(self._files):05d}.npy", documents=0, tokens=0, bytes=0)
        self._files.append(file)
        self._tokens = self._open_files.enter_context(file.path.open("wb"))
        raw = self._open_files.enter_context(file.boundaries.open("wb"))
        # No name and no time in the header: equal content gives equal bytes.
        compressed = self._open_files.enter_context(gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0))
        text = io.TextIOWrapper(compressed, encoding="utf-8", errors="backslashreplace", newline="")
        self._boundaries = csv.writer(self._open_files.enter_context(text), lineterminator="\n")


def save_manifest(manifest: Manifest) -> None:
    """Write `manifest.json` to the manifest's directory, completely or not at all."""
    root, splits = manifest.directory, {}
    for name, split in manifest.splits.items():
        files = [{"path": file.path.relative_to(root).as_posix(), **_counts(file)} for file in split.files]
        splits[name] = {**_counts(split), "files": files}
    values = {name: getattr(manifest, name) for name in _MANIFEST_VALUES}
    content = {"format_version": FORMAT_VERSION, **values, "splits": splits}
    write_text(root / MANIFEST_NAME, json.dumps(content, indent=2) + "\n")


def load_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Read a directory written by `ultramem tokenize`, and check that its files are complete.

    Manifest and tokenizer are compared with their checksums, if there are any; token files only by `Manifest.check`.

    Raises:
        UltraMemError: the directory, its manifest or one of its files is missing, unreadable, damaged or of the wrong
            size.
    """
    root = Path(directory).absolute()
    if not root.is_dir():
        raise UltraMemError(f"{root} does not exist; write it with `ultramem tokenize SOURCES --output {root}`")
    path = root / MANIFEST_NAME
    if not path.is_file():
        raise UltraMemError(
            f"{root} has no {MANIFEST_NAME}: `ultramem tokenize` did not write it, or did not finish; "
            "tokenize again, or give the token files themselves"
        )
    check_files(root, [MANIFEST_NAME, TOKENIZER_NAME], _REMEDY)
    remedy = "tokenize again with --overwrite"
    content = read_json(path, remedy)
    try:
        manifest = _manifest_from_json(content, root)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, error, remedy) from error
    for split in manifest.splits.values():
        for file in split.files:
            _check_file(file, ITEM_SIZES[manifest.dtype])
    if not manifest.tokenizer_path.is_file():
        raise UltraMemError(f"{manifest.tokenizer_path} is missing; copy it back or tokenize again with --overwrite")
    return manifest


def check_token_files(
    paths: Sequence[str | os.PathLike[str]], dtype: str, vocab_size: int, *, every_id: bool = False
) -> list[int]:
    """Check headerless little-endian token files, and count the tokens in each.

    Sizes are checked exactly, ids, which must be below `vocab_size`, in evenly spaced samples of each file, or all.

    Raises:
        ConfigError: `dtype` is neither of the two.
        UltraMemError: no file is named, or one is missing, empty, cut off within a token or has too large an id.
    """
    if dtype not in ITEM_SIZES:
        raise ConfigError(f"dtype={dtype!r}: must be uint16 or uint32, the dtypes of token files")
    if not paths:
        raise UltraMemError("no token file is given; give at least one")
    return [_check_plain_file(Path(path), dtype, vocab_size, every_id) for path in paths]


def _counts(counted: TokenFile | Split) -> dict[str, int]:
    return {name: getattr(counted, name) for name in COUNTS}


def _manifest_from_json(content: dict[str, Any], directory: Path) -> Manifest:
    if content["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format version {content['format_version']}, but this ultramem reads {FORMAT_VERSION}")
    splits = {}
    for name, split in content["splits"].items():
        files = (
            TokenFile(path_inside(directory, file["path"]), *(file[count] for count in COUNTS))
            for file in split["files"]
        )
        splits[name] = Split(name, tuple(files))
    values = {"near_duplicates": 0, **content}  # missing in older manifests
    return Manifest(directory=directory, splits=splits, **{name: values[name] for name in _MANIFEST_VALUES})


def _check_file(file: TokenFile, item_size: int) -> None:
    for path in (file.path, file.boundaries):
        if not path.is_file():
            raise UltraMemError(f"{path} is missing, though the manifest lists it; {_REMEDY}")
    expected, found = file.tokens * item_size, file.path.stat().st_size
    if found != expected:
        raise UltraMemError(
            f"{file.path} is damaged: {found} bytes found, {expected} expected ({file.tokens} tokens of {item_size} "
            f"bytes); {_REMEDY}"
        )


def _check_plain_file(path: Path, dtype: str, vocab_size: int, every_id: bool) -> int:
    if not path.is_file():
        raise UltraMemError(f"token file {path} does not exist; check the path")
    size, item_size = path.stat().st_size, ITEM_SIZES[dtype]
    if size == 0:
        raise UltraMemError(f"token file {path} is empty; tokenize again")
    if size % item_size:
        raise UltraMemError(
            f"token file {path} is truncated or not {dtype}: {size} bytes found, a multiple of {item_size} expected; "
            "copy it again, or give the right dtype"
        )
    tokens = np.memmap(path, mode="r", dtype=np.dtype(dtype).newbyteorder("<"))
    last_start = max(len(tokens) - SAMPLED_TOKENS, 0)
    samples = np.unique(np.linspace(0, last_start, SAMPLED_BLOCKS, dtype=np.int64))
    for start in range(0, len(tokens), SAMPLED_TOKENS) if every_id else samples:
        block = tokens[start : start + SAMPLED_TOKENS]
        if (largest := int(block.max())) >= vocab_size:
            raise UltraMemError(
                f"token file {path} has id {largest} near token {start}, but the vocabulary has {vocab_size} tokens; "
                "give the tokenizer and dtype that it was written with, or copy it again"
            )
    return len(tokens)
