"""What we may remove and replace: only what we wrote and can name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

IsOurs = Callable[[str], object]


def divide(directory: Path, is_ours: IsOurs, below: str = "") -> tuple[list[str], list[str]]:
    """Divide what is below a directory into what we wrote and the rest. Links are not followed.

    Args:
        directory: the directory.
        is_ours: whether a name is one that we write; names are paths in the directory with forward slashes, and those
            of directories end in one. For a regular expression, its `fullmatch`.
        below: the subdirectory to look at, which ends in a slash.

    Returns:
        names of ours, contents before their directory; names of the others, a directory without its contents.

    Raises:
        OSError: a directory cannot be read.
    """
    ours: list[str] = []
    others: list[str] = []
    with os.scandir(directory / below) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            is_directory = entry.is_dir(follow_symlinks=False)
            name = f"{below}{entry.name}{'/' if is_directory else ''}"
            if not is_ours(name):
                others.append(name)
                continue
            if is_directory:
                contents = divide(directory, is_ours, name)
                ours += contents[0]
                others += contents[1]
            ours.append(name)
    return ours, others


def others_in(directory: Path, is_ours: IsOurs) -> list[str]:
    """Names of what we did not write below a directory, as in `divide`; `.` for a link or a file in its place."""
    if directory.is_symlink() or not directory.is_dir():
        return ["."]
    return divide(directory, is_ours)[1]


def remove_ours(directory: Path, is_ours: IsOurs) -> None:
    """Remove what we wrote below a directory, as in `divide`; the rest stays, in its directories.

    Raises:
        OSError: something cannot be removed.
    """
    ours, others = divide(directory, is_ours)
    for name in ours:
        if not name.endswith("/"):
            (directory / name).unlink()
        elif not any(other.startswith(name) for other in others):
            (directory / name).rmdir()
