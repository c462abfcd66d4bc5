"""The one exception type that users see for their own mistakes, and what other errors say to them."""

from __future__ import annotations

import errno
import os
import re

LONGEST_MESSAGE = 1000  # characters


class UltraMemError(Exception):
    """A mistake of the user or in their input; the message says what is wrong and what to do.

    Commands print it as one line, without a traceback, and exit with status 1. What cannot be printed, such as line
    breaks and halves of characters, is escaped, and the middle of a very long message left out.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class ConfigError(UltraMemError, ValueError):
    """An invalid configuration value; the message names the field, the value and what is valid."""


def one_line(text: str) -> str:
    """A text as a line that can be printed and is not too long."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return line if len(line) <= LONGEST_MESSAGE else f"{line[:900]} ... {line[-100:]}"


def first_line(error: BaseException) -> str:
    """The first line of another library's error message; the error's type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def system_reason(error: OSError) -> str:
    """The system's description of an error, without the file name where the two are separate."""
    return error.strerror or first_line(error)


class InterruptedWorkError(UltraMemError):
    """Ctrl-C or SIGTERM ended the work; the message says what becomes of it. Commands exit with status 130."""


_REMEDIES = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "give a file",
    errno.ELOOP: "check its links",
    errno.ENAMETOOLONG: "give a shorter one",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "choose another place",
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EIO: "check the disk",
    errno.EMFILE: "raise the limit on open files, as with ulimit -n",
    errno.ENFILE: "close other programs",
    errno.EAGAIN: "end other processes, or raise the limit on them, as with ulimit -u",
}
# How PyTorch, its allocators and NumPy say that memory is short, or that a size is beyond any memory.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|not enough memory|allocate memory|unable to allocate|tried to allocate|Cannot allocate"
    r"|Storage size calculation overflowed|multiplication overflow|capacity overflow|array is too big",
    re.IGNORECASE,
)
_ALLOCATION = re.compile(r"allocate (\d[\d.]*) ?(bytes|[KMGTPE]iB)", re.IGNORECASE)


def explain(error: BaseException) -> str | None:
    """What an error of Python or a library says about the user's input or machine, and the remedy.

    Returns:
        the text, as `one_line` needs it; None for an error that is unforeseen, and so perhaps a fault of this library.
    """
    if isinstance(error, UltraMemError):
        return str(error)
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
        return _explain_memory(str(error))
    if isinstance(error, OSError):
        return _explain_system(error)
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object} is not valid Unicode ({error.reason}); correct the text or rename the file"
    if isinstance(error, RecursionError):
        return "the input is nested too deeply; make it flatter"
    if isinstance(error, OverflowError):
        return f"a number is beyond the machine's range ({first_line(error)}); give a smaller one"
    if isinstance(error, ValueError) and str(error).startswith("embedded null"):
        return "a path or text has a NUL character; remove it"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return f"no thread can be started; {_REMEDIES[errno.EAGAIN]}"
    return None


def _explain_memory(text: str) -> str:
    place = "the GPU" if "CUDA" in text else "the machine"
    amount = _ALLOCATION.search(text)
    wanted = "" if amount is None else f" ({amount[1]} {amount[2]} more were needed)"
    return f"{place} is out of memory{wanted}; lower the batch size, the sequence length or the size of the model"


def _explain_system(error: OSError) -> str | None:
    if error.errno is None:
        return None  # not the system's, but a library's
    name = "a file, or the standard output," if error.filename is None else os.fsdecode(error.filename)
    return f"{name} cannot be read or written ({system_reason(error)}); {_REMEDIES.get(error.errno, 'check it')}"
