"""What ends a command: one line, an exit status, and for what nobody foresaw a file with the traceback."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from ultramem.cli import border, main
from ultramem.errors import InterruptedWorkError, UltraMemError


@pytest.fixture
def end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs what raises an error; returns the exit status and what is said of the error. Temporary files: tmp_path."""

    def run(error: BaseException) -> tuple[int, str]:
        def command() -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "tempdir", str(tmp_path))
            with pytest.raises(SystemExit) as ended:
                border.run_command(command)
        printed = capfd.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert printed.err.endswith("\n")
        assert printed.err.count("\n") == 1
        return int(str(ended.value.code)), printed.err[len("error: ") : -1]

    return run


SURROGATES = UnicodeEncodeError("utf-8", "a\udcff", 1, 2, "surrogates not allowed")
TOO_MUCH = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UltraMemError("a: must be b; do c"), 1, "a: must be b; do c"),
        (UltraMemError("two\nlines"), 1, r"two\nlines"),
        (InterruptedWorkError("interrupted: run again"), 130, "interrupted: run again"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            MemoryError(),
            1,
            "the machine is out of memory; lower the batch size, the sequence length or the size of the",
        ),
        (
            RuntimeError(f"{TOO_MUCH}allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"),
            1,
            "the machine is out of memory (4000000000000 bytes more were needed); lower the batch size",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of"),
            1,
            "the GPU is out of memory (2.00 GiB more were needed); lower the batch size",
        ),
        (RuntimeError("Storage size calculation overflowed with sizes=[1, 2]"), 1, "the machine is out of memory; "),
        (
            SURROGATES,
            1,
            r"a\udcff is not valid Unicode (surrogates not allowed); correct the text or rename the file",
        ),
        (ValueError("embedded null byte"), 1, "a path or text has a NUL character; remove it"),
        (RecursionError("maximum recursion depth exceeded"), 1, "the input is nested too deeply; make it flatter"),
        (
            OverflowError("int too large to convert to float"),
            1,
            "a number is beyond the machine's range (int too large",
        ),
        (RuntimeError("can't start new thread"), 1, "no thread can be started; end other processes, or raise the"),
        (
            OSError(errno.ENOSPC, "No space"),
            1,
            "a file, or the standard output, cannot be read or written (No space); ",
        ),
    ],
)
def test_foreseen(error: BaseException, status: int, line: str, end: Any, tmp_path: Path) -> None:
    ended, said = end(error)
    assert ended == status
    assert said.startswith(line)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EACCES, "check its permissions"),
        (errno.ENOENT, "check the path"),
        (errno.ELOOP, "check its links"),
        (errno.ENAMETOOLONG, "give a shorter one"),
        (errno.EISDIR, "give a file"),
        (errno.ENOTDIR, "check the path"),
        (errno.EROFS, "choose another place"),
        (errno.EMFILE, "raise the limit on open files, as with ulimit -n"),
        (errno.EIO, "check the disk"),
        (errno.ENXIO, "check it"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", b"a.txt"])
def test_errors_of_the_system(code: int, remedy: str, name: str | bytes, end: Any) -> None:
    said = end(OSError(code, os.strerror(code), name))
    assert said == (1, f"a.txt cannot be read or written ({os.strerror(code)}); {remedy}")


def test_a_long_or_strange_name_is_one_short_line(end: Any) -> None:
    _, said = end(OSError(errno.ENAMETOOLONG, "File name too long", "a" * 5000))
    assert said.startswith("aaaa")
    assert len(said) < 1010
    _, said = end(OSError(errno.ENOENT, "No such file", "a\nb\x1b[2J"))
    assert said.startswith(r"a\nb\x1b[2J cannot")


class PanicException(BaseException):
    """As Rust's libraries raise."""


@pytest.mark.parametrize("error", [KeyError("x"), CheckpointException("boom", {}), PanicException("y"), OSError("z")])
def test_unforeseen(error: BaseException, end: Any, tmp_path: Path) -> None:
    for count in (1, 2):  # a file of its own for each
        status, said = end(error)
        assert status == 70
        match = re.fullmatch(r"unexpected (\w+): .*; please report it with its traceback, in (.*)", said)
        assert match is not None
        assert match[1] == type(error).__name__
        file = Path(match[2])
        assert file.parent == tmp_path
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert "in command\n    raise error\n" in file.read_text()
        assert len(list(tmp_path.iterdir())) == count


def test_unforeseen_in_one_of_several_processes(end: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK", "3")
    assert f"in {tmp_path}/ultramem-rank3-" in end(KeyError("x"))[1]
    monkeypatch.setenv("RANK", "../x")
    assert f"in {tmp_path}/ultramem-" in end(KeyError("x"))[1]


def test_unforeseen_without_a_place_for_the_traceback(end: Any, tmp_path: Path) -> None:
    tmp_path.rmdir()
    assert end(KeyError("x")) == (
        70,
        "unexpected KeyError: 'x'; its traceback cannot be written (No such file or directory); please report it",
    )


def command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "ultramem.cli", *map(str, arguments)], stderr=subprocess.PIPE, timeout=60, **options
    )


def test_a_wrong_command_line_keeps_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (["evaluate"], ["evaluate", "--nonsense"], ["nonsense"], ["generate", "RUN", "--seed", "x"]):
        monkeypatch.setattr("sys.argv", ["ultramem", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2, arguments


def test_a_file_that_ends_too_early(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def read(*_: object) -> None:
        raise EOFError("Compressed file ended before the end-of-stream marker was reached")

    monkeypatch.setattr("ultramem.report.write_report", read)
    monkeypatch.setattr("sys.argv", ["ultramem", "report", "run"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("error: a file ends too early (Compressed file ended before")


def test_a_full_standard_output_is_one_line() -> None:
    with Path("/dev/full").open("wb") as full:
        ended = command("--help", stdout=full)
    assert ended.returncode == 1
    line = (
        b"error: a file, or the standard output, cannot be read or written (No space left on device); free some space\n"
    )
    assert ended.stderr == line


def test_a_reader_that_left_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    ended = command("--help", stdout=write)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (1, b"")


def test_a_terminal_that_cannot_show_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr("sys.stdout", terminal)
    border.run_command(lambda: print("ä€\udcff", flush=True))
    assert terminal.buffer.getvalue() == b"\xe4\\u20ac\\udcff\n"  # type: ignore[attr-defined]


def test_a_prompt_that_is_not_unicode(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["ultramem", "generate", str(run.path), "a\udcff"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith(r"error: a\udcff is not valid Unicode")


def test_an_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("ultramem.report.write_report", lambda *_: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr("sys.argv", ["ultramem", "report", "run"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code, capsys.readouterr().err) == (130, "")
