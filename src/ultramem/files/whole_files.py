"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
from pathlib import Path


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
