"""An output directory that appears whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from ultramem.errors import UltraMemError, system_reason
from ultramem.files.locks import locked
from ultramem.files.removal import remove


@contextmanager
def partial_directory(output: Path, overwrite: bool, marker: str, contents: Sequence[str] = ("*",)) -> Iterator[Path]:
    """An empty `OUTPUT.partial` to work in, renamed to `output` at the end and removed if an exception passes.

    What a killed run left there is cleared first.

    Args:
        output: absolute path of the directory to make.
        overwrite: replace a finished one.
        marker: name of a file by which a finished one is known; what is without it is never replaced.
        contents: patterns of what a finished one may hold; with anything else in it, it is never replaced.

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
