"""Writing JSON files whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ultramem.errors import UltraMemError


def write_json(path: Path, content: Any) -> None:
    """Write the content to a temporary file beside `path` and rename it.

    Raises:
        UltraMemError: the file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.partial")
    try:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UltraMemError(f"{path} cannot be written: {error.strerror}") from error
