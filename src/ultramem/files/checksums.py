"""Checksums of a directory's files: written with the files, checked when they are read."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultramem.errors import UltraMemError, system_reason
from ultramem.files.json_files import parse_json, path_inside
from ultramem.files.whole_files import write_text

CHECKSUMS_NAME = "checksums.json"
READ_BYTES = 2**22

Pieces = list[tuple[int, int]]


class DamagedFileError(UltraMemError):
    """A file is not as it was written."""


@dataclass(frozen=True)
class Checksums:
    """CRC-32 of the pieces of each file of a directory, as in zip archives.

    They find every flipped bit and every burst of errors up to 32 bits, and miss other damage once in 2**32 times. They
    protect against faults, not against people: whoever changes a file can change its checksum too.

    Attributes:
        directory: the directory.
        files: by path in the directory, with forward slashes: length in bytes and CRC-32 of each piece, in order. The
            pieces of a file cover it; most files have one.
    """

    directory: Path
    files: Mapping[str, Pieces]

    @staticmethod
    def compute(directory: Path, names: Iterable[str], pieces: Mapping[str, list[int]] | None = None) -> Checksums:
        """Read files and compute their checksums, several at a time.

        Args:
            directory: the directory.
            names: paths of files in it.
            pieces: lengths of the pieces of some of these files, to be read one by one later.

        Raises:
            OSError: a file cannot be read.
        """
        listed = sorted(names)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            computed = threads.map(lambda name: _pieces(directory / name, (pieces or {}).get(name)), listed)
            return Checksums(directory, dict(zip(listed, computed, strict=True)))

    @staticmethod
    def load(directory: Path) -> Checksums | None:
        """Read the directory's `checksums.json`; None if there is none, as in directories of version 0.1.

        Raises:
            DamagedFileError: the file cannot be understood.
        """
        path = directory / CHECKSUMS_NAME
        try:
            content = parse_json(path.read_bytes())
            if content["algorithm"] != "crc32":
                raise ValueError("another algorithm than crc32")
            files = {name: [_parse_piece(piece) for piece in pieces] for name, pieces in content["files"].items()}
            for name in files:
                path_inside(directory, name)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UltraMemError(f"{path} cannot be read ({system_reason(error)}); check its permissions") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedFileError(f"{path} is damaged ({type(error).__name__})") from error
        return Checksums(directory, files)

    def save(self) -> None:
        """Write `checksums.json`, completely or not at all.

        Raises:
            OSError: it cannot be written.
        """
        files = {name: [[length, f"{crc:08x}"] for length, crc in pieces] for name, pieces in self.files.items()}
        write_text(self.directory / CHECKSUMS_NAME, json.dumps({"algorithm": "crc32", "files": files}) + "\n")

    def check(self, names: Iterable[str] | None = None) -> None:
        """Read files, several at a time, and compare them.

        Args:
            names: paths in the directory; by default all that have checksums.

        Raises:
            DamagedFileError: a file is missing or is not as it was written, or has no checksum.
            OSError: a file cannot be read.
        """
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            for _ in threads.map(self._check_file, sorted(self.files if names is None else names)):
                pass

    def check_piece(self, name: str, offset: int, content: bytes) -> None:
        """Compare a piece that has been read.

        Raises:
            DamagedFileError: it is not as it was written, or not a piece of the file.
        """
        start = 0
        for length, crc in self.files.get(name, []):
            if start == offset and length == len(content):
                if zlib.crc32(content) != crc:
                    raise self._damaged(name)
                return
            start += length
        raise self._damaged(name)

    def _check_file(self, name: str) -> None:
        expected = self.files.get(name)
        if expected is None:
            raise DamagedFileError(f"{self.directory / name} has no checksum in {CHECKSUMS_NAME}")
        try:
            found = _pieces(self.directory / name, [length for length, _ in expected])
        except FileNotFoundError as error:
            raise DamagedFileError(f"{self.directory / name} is missing") from error
        if found != expected:
            raise self._damaged(name)

    def _damaged(self, name: str) -> DamagedFileError:
        return DamagedFileError(f"{self.directory / name} is damaged: it differs from its checksum")


def check_files(directory: Path, names: Iterable[str], remedy: str) -> None:
    """Compare those of a directory's files that its `checksums.json` lists; version 0.1 wrote none.

    Args:
        directory: the directory.
        names: paths in it.
        remedy: what to do about a damaged file, for the error.

    Raises:
        UltraMemError: a file is missing or damaged, or cannot be read.
    """
    try:
        checksums = Checksums.load(directory)
        if checksums is not None:
            checksums.check(name for name in names if name in checksums.files)
    except DamagedFileError as error:
        on_purpose = f"if it was changed on purpose, remove {directory / CHECKSUMS_NAME}"
        raise DamagedFileError(f"{error}; {remedy}; {on_purpose}") from error
    except OSError as error:
        raise UltraMemError(f"{error.filename} cannot be read ({system_reason(error)}); check the file") from error


def _pieces(path: Path, lengths: list[int] | None) -> Pieces:
    """Checksums of a file's pieces; what the lengths do not cover is a piece more, a missing part a shorter one."""
    size = path.stat().st_size
    wanted = [size] if lengths is None else [*lengths, size - sum(lengths)]
    pieces: Pieces = []
    buffer = memoryview(bytearray(min(READ_BYTES, max(wanted))))
    with path.open("rb", buffering=0) as file:
        for length in wanted:
            done = crc = 0
            while done < length and (count := file.readinto(buffer[: length - done])):
                crc = zlib.crc32(buffer[:count], crc)
                done += count
            pieces.append((done, crc))
    return pieces if lengths is None or pieces[-1][0] else pieces[:-1]


def _parse_piece(piece: Any) -> tuple[int, int]:
    length, crc = piece
    if not isinstance(length, int) or not 0 <= length < 2**63:
        raise ValueError("a length is no whole number")
    return length, int(crc, 16)
