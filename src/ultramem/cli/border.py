"""The border of the program: whatever ends a command, the user gets one line and an exit status."""

from __future__ import annotations

import io
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import NoReturn

from rich.console import Console
from rich.markup import escape

from ultramem.errors import InterruptedWorkError, explain, first_line, one_line, system_reason

MISTAKE, UNFORESEEN, INTERRUPTED = 1, 70, 130  # exit statuses; 2 is a wrong command line


def run_command(command: Callable[[], object]) -> None:
    """Run a command. An error ends in one line on standard error; an unforeseen one leaves its traceback in a file.

    Raises:
        SystemExit: the command asked for it, or did not succeed.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character shows its number
            stream.reconfigure(errors="backslashreplace")
    try:
        command()
    except SystemExit:
        raise
    except KeyboardInterrupt:
        _end("interrupted", INTERRUPTED)
    except BaseException as error:  # some of PyTorch and of Rust libraries are no Exception
        explained = explain(error)
        if explained is None:
            _end(_record(error), UNFORESEEN)
        _end(explained, INTERRUPTED if isinstance(error, InterruptedWorkError) else MISTAKE)


def _end(said: str, status: int) -> NoReturn:
    try:
        print(end="", flush=True)
    except OSError:  # it would fail again at exit, with a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {escape(one_line(said))}")
    sys.exit(status)


def _record(error: BaseException) -> str:
    """Write the traceback to a new file that only the user can read, and describe the error."""
    kind = f"unexpected {type(error).__name__}: {first_line(error)}"
    text = "".join(traceback.format_exception(error))
    rank = os.environ.get("RANK", "")
    prefix = f"ultramem-rank{rank}-" if rank.isdecimal() else "ultramem-"
    try:
        descriptor, path = tempfile.mkstemp(prefix=prefix, suffix=".txt")  # of mode 0600, and not there before
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as unwritten:
        return f"{kind}; its traceback cannot be written ({system_reason(unwritten)}); please report it"
    return f"{kind}; please report it with its traceback, in {path}"
