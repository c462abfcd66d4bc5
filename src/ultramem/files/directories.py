"""Output directories that appear only when complete; locks on directories; removal."""

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
    """Yield an empty directory `OUTPUT.partial`, which is renamed to `output` at the end or removed on an exception.

    Files that a killed run left there are removed first.

    Args:
        output: absolute path of the directory to write.
        overwrite: whether to replace a finished one.
        marker: name of a file that marks a finished directory; one without it is never replaced.
        contents: patterns of the files that a finished directory may hold; one with other files is never replaced.

    Raises:
        UltraMemError: `output` exists and must not be replaced, another run is writing it, or it cannot be created.
    """
    if output.name in ("", ".."):
        raise UltraMemError(f"{output} has no name of its own; choose another directory")
    partial = output.with_name(f"{output.name}.partial")
    try:
        _check_replaceable(output, overwrite, marker, contents)
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UltraMemError(f"{output} cannot be created ({system_reason(error)}); choose another directory") from error
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
    """Hold a lock on a directory. The system releases it, however the process ends.

    Args:
        directory: directory to lock.
        busy: error message if another process holds the lock.

    Raises:
        UltraMemError: another process holds the lock.
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
    """Remove a file, a link, or a directory with its contents."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _check_replaceable(output: Path, overwrite: bool, marker: str, contents: Sequence[str]) -> None:
    if not output.exists():
        if output.is_symlink():
            raise UltraMemError(f"{output} is a link to nothing; remove it, or choose another directory")
        return
    if not output.is_dir():
        raise UltraMemError(f"{output} is a file; choose another name")
    if (output / marker).is_file():
        if not overwrite:
            raise UltraMemError(f"{output} exists already; replace it with --overwrite or choose another directory")
        for name in sorted(path.name for path in output.iterdir()):
            if not any(fnmatch(name, pattern) for pattern in contents):
                raise UltraMemError(f"{output} also holds {name}, which would be lost; choose another directory")
    elif any(output.iterdir()):
        raise UltraMemError(f"{output} is not empty and has no {marker}; choose another directory")


def _replace(output: Path, partial: Path) -> None:
    replaced = output.with_name(f"{output.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)  # a run that was killed here may have left it
    if output.exists():
        output.rename(replaced)
    partial.rename(output)
    shutil.rmtree(replaced, ignore_errors=True)
