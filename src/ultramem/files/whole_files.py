"""Atomic writes of text files."""

from __future__ import annotations

import contextlib
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file under a temporary name beside `path`, then rename it.

    Raises:
        OSError: the file cannot be written; an existing file at `path` is unchanged.
    """
    temporary = path.with_name(f"{path.name}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
