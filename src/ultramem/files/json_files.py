"""Writing JSON files whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ultramem.errors import UltraMemError
from ultramem.files.whole_files import write_text


def write_json(path: Path, content: Any) -> None:
    """Write the content as indented JSON.

    Raises:
        UltraMemError: the file cannot be written.
    """
    try:
        write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UltraMemError(f"{path} cannot be written: {error.strerror}") from error
