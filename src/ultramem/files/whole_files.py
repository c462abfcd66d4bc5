"""Files that are written whole or not at all, and directories that one process at a time writes to."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ultramem.errors import UltraMemError


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file to a temporary name beside `path` and rename it.

    Raises:
        OSError: it cannot be written; what was at `path` is still there.
    """
    temporary = path.with_name(f"{path.name}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def locked(directory: Path, busy: str) -> Iterator[None]:
    """Hold a lock on a directory, which the system releases however the process ends.

    Args:
        directory: to lock.
        busy: what to say where another process holds it.

    Raises:
        UltraMemError: another process holds it.
        OSError: the directory cannot be opened.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UltraMemError(busy) from error
        yield
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a link, or a directory with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
