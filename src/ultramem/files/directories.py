"""Directories: made whole or not at all, locked, and removed."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from ultramem.errors import UltraMemError, system_reason


@contextmanager
def partial_directory(output: Path, overwrite: bool, marker: str, contents: Sequence[str] = ("*",)) -> Iterator[Path]:
    """An empty `OUTPUT.partial` to work in, renamed to `output` at the end and removed if an exception passes.

    What a killed run left there is cleared first.

    Args:
        output: Absolute path of the directory to make.
        overwrite: Replace a finished one.
        marker: Name of a file by which a finished one is known; what is without it is never replaced.
        contents: Patterns of what a finished one may hold; with anything else in it, it is never replaced.

    Raises:
        UltraMemError: `output` is there and must not be replaced, another run is writing it, or it cannot be made.
    """
    partial = output.with_name(f"{output.name}.partial")
    try:
        _check_replaceable(output, overwrite, marker, contents)
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UltraMemError(f"{output} cannot be made ({system_reason(error)}); choose another directory") from error
    with locked(partial, f"another run is writing {partial}; wait for it or choose another directory"):
        for leftover in partial.iterdir():
            remove(leftover)
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _replace(output, partial)


@contextmanager
def locked(directory: Path, busy: str) -> Iterator[None]:
    """Hold a lock on a directory, which the system releases however the process ends.

    Args:
        directory: to lock.
        busy: what to say where another process holds it.

    Raises:
        UltraMemError: another process holds it.
        OSError: the directory cannot be opened.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UltraMemError(busy) from error
        yield
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a link, or a directory with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _check_replaceable(output: Path, overwrite: bool, marker: str, contents: Sequence[str]) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise UltraMemError(f"{output} is a file; choose a directory")
    if (output / marker).is_file():
        if not overwrite:
            raise UltraMemError(f"{output} is finished already; replace it with --overwrite or choose another")
        for name in sorted(path.name for path in output.iterdir()):
            if not any(fnmatch(name, pattern) for pattern in contents):
                raise UltraMemError(f"{output} holds {name} as well, which would be lost; choose another directory")
    elif any(output.iterdir()):
        raise UltraMemError(f"{output} holds other files, but no {marker}; choose another directory")


def _replace(output: Path, partial: Path) -> None:
    replaced = output.with_name(f"{output.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)  # a run that was killed here may have left it
    if output.exists():
        output.rename(replaced)
    partial.rename(output)
    shutil.rmtree(replaced, ignore_errors=True)
