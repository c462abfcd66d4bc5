"""Atomic writes of text and JSON files."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from ultramem.errors import UltraMemError, system_reason


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


def write_json(path: Path, content: Any) -> None:
    """Write the content as indented JSON.

    Raises:
        UltraMemError: the file cannot be written.
    """
    try:
        write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UltraMemError(f"{path} cannot be written: {system_reason(error)}") from error
