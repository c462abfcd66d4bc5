"""Output directories that appear only when complete, and locks on directories."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ultramem.errors import UltraMemError, first_line, system_reason
from ultramem.files.checksums import CHECKSUMS_NAME, Checksums
from ultramem.files.owned import others_in
from ultramem.files.whole_files import cannot_write, write_text

# In `OUTPUT.partial`: what says that it is ours, the directory that is written, and the finished one that it replaces.
MARK_NAME, MARK = ".ultramem", "ultramem writes here; remove this directory only when no command is running\n"
NEW_NAME, OLD_NAME = "new", "old"


@dataclass(frozen=True)
class Product:
    """How a finished output directory of a command is recognised.

    Attributes:
        marker: name of a file that every such directory has.
        is_ours: whether the marker in a directory is one that we wrote.
        names: the files and directories that we write, as in `owned.divide`, for a directory without checksums.
    """

    marker: str
    is_ours: Callable[[Path], bool]
    names: re.Pattern[str]

    def others_in(self, directory: Path) -> list[str]:
        """Names of what we did not write in a finished directory."""
        ours = _listed(directory)
        if ours is None:
            return others_in(directory, self.names.fullmatch)
        for part in filter(Path.is_dir, directory.iterdir()):
            name = f"{part.name}/"
            if self.names.fullmatch(name) and (listed := _listed(part)) is not None:
                ours |= {name, *(name + below for below in listed)}
        return others_in(directory, ours.__contains__)


@contextmanager
def partial_directory(output: Path, overwrite: bool, product: Product, sources: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield an empty directory in `OUTPUT.partial`, which becomes `output` at the end or is removed on an exception.

    What a killed run left there is removed first. A finished directory is replaced only if we wrote all that is in it.

    Args:
        output: the directory to write; if it is a link, its target is written.
        overwrite: whether to replace a finished one.
        product: what a finished one is.
        sources: files and directories that are read; the output must be apart from them.

    Raises:
        UltraMemError: `output` exists and must not be replaced, another run is writing it, or it cannot be written,
            also if writing to the directory fails.
    """
    with cannot_write(output):
        place = Path(os.path.realpath(output))
        _check_place(place, sources)
        _check_replaceable(place, overwrite, product)
        partial = place.with_name(f"{place.name}.partial")
        _check_mark(partial)
        partial.mkdir(parents=True, exist_ok=True)
    with locked(partial, f"another run is writing {partial}; wait for it or choose another directory"):
        with cannot_write(output):
            _clear(partial, place)
        try:
            yield partial / NEW_NAME
        except BaseException as error:
            _remove(partial)
            reason = None if isinstance(error, UltraMemError) else _system_reason(error)
            if reason is None:
                raise
            raise UltraMemError(
                f"{output} cannot be written ({reason}) and the partial output was removed; free some space or choose "
                "another directory, then run again"
            ) from error
        try:
            _check_replaceable(place, overwrite, product)  # files may have come there in the meantime
            _put_in_place(partial, place)
        except (UltraMemError, OSError) as error:
            reason = _system_reason(error) or str(error)
            raise UltraMemError(
                f"what was written is in {partial / NEW_NAME}, but not in its place ({reason})"
            ) from error


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


def _check_place(place: Path, sources: Iterable[Path]) -> None:
    """Refuse places whose replacement would take more with it, or that are read."""
    if place.parent == place or os.path.ismount(place):
        raise UltraMemError(f"{place} is the root of a file system; choose a directory in it")
    for name, directory in (("home", Path(os.environ.get("HOME", "/"))), ("working", Path.cwd())):
        if Path(os.path.realpath(directory)).is_relative_to(place):
            raise UltraMemError(f"{place} is, or holds, the {name} directory; choose another directory")
    for source in sources:
        real = Path(os.path.realpath(source))
        if place.is_relative_to(real) or real.is_relative_to(place):
            raise UltraMemError(f"{place} is in, or holds, {source}, which is read; choose another directory")


def _check_replaceable(place: Path, overwrite: bool, product: Product) -> None:
    if not place.exists():
        if place.is_symlink():  # though links are resolved
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        return
    if not place.is_dir():
        raise UltraMemError(f"{place} is a file; choose another name")
    if not any(place.iterdir()):
        return
    if not (place / product.marker).is_file():
        raise UltraMemError(f"{place} is not empty and has no {product.marker}; choose another directory")
    if not overwrite:
        raise UltraMemError(f"{place} exists already; replace it with --overwrite or choose another directory")
    if not product.is_ours(place):
        raise UltraMemError(f"{place} has a {product.marker} that ultramem did not write; choose another directory")
    if others := product.others_in(place):
        raise UltraMemError(f"{place} also holds {others[0]}, which would be lost; choose another directory")


def _check_mark(partial: Path) -> None:
    if not os.path.lexists(partial):
        return
    is_directory = partial.is_dir() and not partial.is_symlink()
    mark = partial / MARK_NAME
    if not is_directory or (any(partial.iterdir()) and not (mark.is_file() and mark.read_bytes() == MARK.encode())):
        raise UltraMemError(f"{partial} is in the way, as no killed run left it; rename it, or choose another name")


def _clear(partial: Path, place: Path) -> None:
    """Mark the directory as ours, and remove what a killed run left; give back what that run had put aside."""
    write_text(partial / MARK_NAME, MARK)
    if (partial / OLD_NAME).exists() and not place.exists():
        (partial / OLD_NAME).rename(place)
    for name in (NEW_NAME, OLD_NAME):
        if (partial / name).exists():
            shutil.rmtree(partial / name)
    (partial / NEW_NAME).mkdir()


def _put_in_place(partial: Path, place: Path) -> None:
    if place.exists():
        place.rename(partial / OLD_NAME)
    try:
        (partial / NEW_NAME).rename(place)
    except OSError:
        if (partial / OLD_NAME).exists():
            (partial / OLD_NAME).rename(place)
        raise
    _remove(partial)


def _remove(partial: Path) -> None:
    for name in (NEW_NAME, OLD_NAME):
        shutil.rmtree(partial / name, ignore_errors=True)
    with suppress(OSError):
        (partial / MARK_NAME).unlink()
        partial.rmdir()  # unless it holds more


def _listed(directory: Path) -> set[str] | None:
    """Names in a directory's checksums, and those of the directories that hold them; None without checksums."""
    checksums = Checksums.load(directory)
    if checksums is None:
        return None
    above = {f"{parent}/" for name in checksums.files for parent in PurePosixPath(name).parents}
    return {CHECKSUMS_NAME, *checksums.files, *above}


def _system_reason(error: BaseException) -> str | None:
    """Why the system refused; None if it was something else. Libraries in Rust give it in their own errors' text."""
    if isinstance(error, OSError):
        return system_reason(error)
    return first_line(error) if re.search(r"\(os error [0-9]+\)", str(error)) else None
