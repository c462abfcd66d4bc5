"""Atomic writes of text and JSON files, and reading that does not wait for ever."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ultramem.errors import UltraMemError, system_reason

TEMPORARY_NAME = re.compile(r"\.ultramem-[0-9a-f]{16}\.partial")  # what a killed process may leave
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def read_bytes(path: Path, most: int = -1) -> bytes:
    """Read a file, or a pipe.

    Args:
        path: the file.
        most: number of bytes to read at most; -1 for all.

    Raises:
        OSError: the file cannot be read, or is a device or a pipe that nobody writes to.
    """
    with open(path, "rb", opener=_open_at_once) as file:
        content = file.read(most)
        if not content and stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "nobody writes to this pipe", str(path))
    return content


def _open_at_once(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if stat.S_ISCHR(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is a device", path)
    os.set_blocking(descriptor, True)
    return descriptor


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, as in `whole_file`.

    Raises:
        OSError: the file cannot be written; an existing file at `path` is unchanged.
    """
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a new file beside `path`, which is renamed at the end, or removed on an exception.

    Where `path` is a link, its target is replaced.

    Raises:
        OSError: the file cannot be written; an existing file at `path` is unchanged.
    """
    with _temporary_file(path) as (temporary, place):
        yield temporary
        temporary.replace(place)


def write_json(path: Path, content: Any) -> None:
    """Write the content as indented JSON.

    Raises:
        UltraMemError: the file cannot be written.
    """
    with cannot_write(path):
        write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def check_output(path: Path, is_ours: Callable[[Path], bool] = lambda path: True) -> None:
    """Find out, before long work, whether `write_text` can write a file and may replace the one that is there.

    Args:
        path: the file.
        is_ours: whether an existing file that is not empty is of the kind that is to be written.

    Raises:
        UltraMemError: the file cannot be written, or is not ours.
    """
    with cannot_write(path), _temporary_file(path) as (_, place):
        if place.exists() and place.stat().st_size and not is_ours(place):
            raise UltraMemError(f"{path} is a file that ultramem did not write; choose another name")


@contextlib.contextmanager
def cannot_write(path: Path | str) -> Iterator[None]:
    """Turn the system's errors into one of the user's, which names the file.

    Raises:
        UltraMemError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        remedy = "free some space" if error.errno in _FULL else "choose another place, or mend this one"
        raise UltraMemError(f"{path} cannot be written ({system_reason(error)}); {remedy}") from error


@contextlib.contextmanager
def _temporary_file(path: Path) -> Iterator[tuple[Path, Path]]:
    """Make a file beside `path`, which is removed at the end if it is still there.

    Yields:
        the file, and the place where `path` is, links resolved.

    Raises:
        OSError: also in place of one raised inside; it names `path`.
    """
    place = Path(os.path.realpath(path))
    temporary = place.parent / f".ultramem-{secrets.token_hex(8)}.partial"
    try:
        _check_replaceable(place)
        with temporary.open("xb"):
            pass
        yield temporary, place
    except OSError as error:
        error.filename = str(path)  # not the temporary one, or none
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _check_replaceable(place: Path) -> None:
    try:
        mode = place.stat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file")
    if not os.access(place, os.W_OK):  # renaming would replace it all the same
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
