"""Text from files and pipes, and nothing that keeps one waiting."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from ultramem.files.reading import read_text


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes("äb\r\n".encode())
    assert read_text(tmp_path / "file") == "äb\r\n"
    assert read_text(tmp_path / "file", 2) == "ä"
    (tmp_path / "file").write_bytes(b"\xff")
    with pytest.raises(UnicodeDecodeError):
        read_text(tmp_path / "file")


def test_a_pipe_is_read_if_somebody_writes_to_it(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="nobody writes to this pipe"):
        read_text(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # lets the writer open it at once
    with pipe.open("w") as file:
        writer = threading.Timer(0.1, lambda: (file.write("ä" * 10_000), file.close()))
        writer.start()
        assert read_text(pipe) == "ä" * 10_000
        writer.join()
    os.close(reader)


def test_a_device(tmp_path: Path) -> None:
    for path in (Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(OSError, match="it is a device"):
            read_text(path)
    with pytest.raises(IsADirectoryError):
        read_text(tmp_path)
