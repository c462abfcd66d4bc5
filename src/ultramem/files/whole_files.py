"""Files that are written whole or not at all, and JSON files read where they can be understood."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from ultramem.errors import UltraMemError, system_reason


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
    """The names and values in a file; none where it is missing or cannot be understood."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
