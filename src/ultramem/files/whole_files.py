"""Atomic writes of text and JSON files, and reads of optional JSON files."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from ultramem.errors import UltraMemError, system_reason


def read_text(path: Path) -> str:
    """Read a UTF-8 file, or a pipe.

    Raises:
        OSError: the file cannot be read, or is a device or a pipe that nobody writes to.
        UnicodeDecodeError: it is not UTF-8.
    """
    with open(path, encoding="utf-8", opener=_open_at_once) as file:
        text = file.read()
        if not text and stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "nobody writes to this pipe", str(path))
    return text


def _open_at_once(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if stat.S_ISCHR(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is a device", path)
    os.set_blocking(descriptor, True)
    return descriptor


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file under a temporary name beside `path`, then rename it.

    Raises:
        OSError: the file cannot be written; an existing file at `path` is unchanged.
    """
    path = path.absolute()  # which has a name, if it is not the root
    if not path.name or path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():  # it would be replaced, be it /dev/null
        raise OSError(errno.EINVAL, "it is a device or a pipe", str(path))
    temporary = path.with_name(f"{path.name}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except (OSError, UnicodeEncodeError):
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_json(path: Path, content: Any) -> None:
    """Write the content as indented JSON.

    Raises:
        UltraMemError: the file cannot be written.
    """
    try:
        write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UltraMemError(f"{path} cannot be written: {system_reason(error)}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; empty if the file is missing or not valid."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
