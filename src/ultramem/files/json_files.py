"""Reading JSON files, whatever they hold; paths in them."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

from ultramem.errors import UltraMemError, first_line, system_reason
from ultramem.files.whole_files import read_bytes

LARGEST_FILE = 2**28  # bytes; a million token files in a manifest need half of it
LONGEST_NAME = 255  # bytes, as file systems have it


def parse_json(text: str | bytes) -> Any:
    """Parse JSON in UTF-8, in which no key comes twice, whole numbers have at most 64 bits, and texts can be written.

    Raises:
        ValueError: the text is something else.
    """
    text = text if isinstance(text, str) else text.decode("utf-8")
    try:
        content = json.loads(text, object_pairs_hook=_object, parse_int=_whole_number)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if re.search(r"\\u[dD][89a-fA-F]", text):  # a half of a character in UTF-16, perhaps without the other
        json.dumps(content, ensure_ascii=False).encode()
    return content


def read_json(path: Path, remedy: str) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        remedy: what to do if it is missing or damaged, for the error.

    Raises:
        UltraMemError: the file cannot be read, or is not valid.
    """
    try:
        return _read(path)
    except OSError as error:
        raise UltraMemError(f"{path} cannot be read ({system_reason(error)}); {remedy}") from error
    except ValueError as error:
        raise damaged(path, error, remedy) from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Read the object in an optional JSON file; empty if the file is missing or not valid."""
    try:
        content = _read(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def damaged(path: Path, reason: Exception, remedy: str) -> UltraMemError:
    """The error for a file whose content is not what it must be."""
    words = first_line(reason)
    if isinstance(reason, KeyError):
        words = f"{reason} is missing"
    elif isinstance(reason, TypeError | AttributeError):
        words = "a list or an object is something else"
    return UltraMemError(f"{path} is damaged ({words}); {remedy}")


def path_inside(directory: Path, name: str) -> Path:
    """The path of a file in a directory, by its name in a file there, with forward slashes.

    Raises:
        ValueError: the name leads out of the directory, or is none.
    """
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or name.startswith("/") or "\0" in name or len(name.encode()) > LONGEST_NAME:
        raise ValueError(f"{name[:100]!r} is no path in this directory")
    return directory / name


def _read(path: Path) -> Any:
    content = read_bytes(path, LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise ValueError(f"it is larger than {LARGEST_FILE} bytes")
    return parse_json(content)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)[:100]!r} is in it twice")
    return content


def _whole_number(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise ValueError("it has a whole number of more than 64 bits")
    return int(digits)
