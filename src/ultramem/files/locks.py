"""Locks on directories."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ultramem.errors import UltraMemError


@contextmanager
def locked(directory: Path, busy: str) -> Iterator[None]:
    """Hold a lock on a directory. The system releases it, however the process ends.

    Args:
        directory: directory to lock.
        busy: error message if another process holds the lock.

    Raises:
        UltraMemError: another process holds the lock.
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
