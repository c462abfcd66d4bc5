"""JSON files: atomic writes, and reads of optional files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ultramem.errors import UltraMemError, system_reason
from ultramem.files.whole_files import write_text


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
