"""Reading text that a user names: from a file, or from a pipe that somebody writes to."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def read_text(path: Path, most: int = -1) -> str:
    """Read UTF-8 text.

    Args:
        path: a file or a pipe.
        most: number of bytes after which to stop; by default all are read.

    Raises:
        OSError: it cannot be read, or is a device or a pipe that nobody writes to.
        UnicodeDecodeError: it is not UTF-8.
    """
    with open(path, "rb", opener=_open_at_once) as file:
        content = file.read(most)
        if not content and stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "nobody writes to this pipe", str(path))
    return content.decode("utf-8")


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting for somebody to write to a pipe."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if stat.S_ISCHR(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is a device", path)
    os.set_blocking(descriptor, True)
    return descriptor
