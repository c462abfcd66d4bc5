"""Files are replaced whole."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from ultramem.files.whole_files import read_text, write_text


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_text(path, "änderung 1")
    assert path.read_bytes() == "änderung 1".encode()

    def write_half(self: Path, text: str, encoding: str) -> None:
        self.write_bytes(text.encode()[:4])
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write_half)
        with pytest.raises(OSError, match="disk full"):
            write_text(path, "änderung 2")
    assert path.read_text(encoding="utf-8") == "änderung 1"
    assert list(tmp_path.iterdir()) == [path]


def test_the_first_error_is_the_one_raised(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as caught:
        write_text(tmp_path / "file" / "below", "")
    assert caught.value.__context__ is None


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    """Not /dev/null, which renaming would make a file of."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(OSError, match="it is a device or a pipe"):
            write_text(path, "text")
    for path in (tmp_path, Path("/")):
        with pytest.raises(IsADirectoryError):
            write_text(path, "text")
    assert (tmp_path / "pipe").is_fifo()
    assert list(tmp_path.iterdir()) == [tmp_path / "pipe"]


def test_a_text_that_is_not_unicode_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "file", "a\udcff")
    assert not any(tmp_path.iterdir())


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
    with pytest.raises(OSError, match="it is a device"):
        read_text(Path("/dev/zero"))
