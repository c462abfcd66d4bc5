"""Writing token files of limited length, in the format of `dolma tokens`."""

from __future__ import annotations

import csv
import gzip
import io
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from ultramem.data.documents import Document
from ultramem.data.token_files import Split, TokenFile


class SplitWriter:
    """Writes the documents of a split to `part-00000.npy`, `part-00001.npy` and so on.

    Documents are not divided between files, so one longer than `shard_tokens` makes a longer file.

    Args:
        directory: directory of the files, created with the first document.
        shard_tokens: maximum number of tokens per file.
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
        name, source = _one_line(document.name), _one_line(document.source)
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


def _one_line(text: str) -> str:
    """Remove line breaks: OLMo-core reads the table line by line."""
    return text.replace("\n", "\\n").replace("\r", "\\r")
