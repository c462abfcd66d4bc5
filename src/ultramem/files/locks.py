"""Directories that one process at a time writes to."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ultramem.errors import UltraMemError


@contextmanager
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
