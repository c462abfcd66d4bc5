"""Files are replaced whole, and only where that is meant."""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from ultramem.errors import UltraMemError
from ultramem.files.whole_files import TEMPORARY_NAME, check_output, read_bytes, whole_file, write_text


def full(self: Path, text: str, encoding: str) -> None:
    self.write_bytes(text.encode()[:4])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_text(path, "änderung 1")
    assert path.read_bytes() == "änderung 1".encode()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left") as caught:
            write_text(path, "änderung 2")
    assert caught.value.filename == str(path)
    assert path.read_text(encoding="utf-8") == "änderung 1"
    assert list(tmp_path.iterdir()) == [path]


def test_the_first_error_is_the_one_raised(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as caught:
        write_text(tmp_path / "file" / "below", "")
    assert caught.value.__context__ is None
    assert caught.value.filename == str(tmp_path / "file" / "below")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_nothing_is_left_after_an_exception(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with whole_file(tmp_path / "file") as temporary:
            assert TEMPORARY_NAME.fullmatch(temporary.name)
            raise error

    with pytest.raises(error):
        fail()
    assert not any(tmp_path.iterdir())


def test_a_users_file_of_any_other_name_is_safe(tmp_path: Path) -> None:
    for name in ("file.partial", "file.tmp", "file~"):
        (tmp_path / name).write_text("mine")
    write_text(tmp_path / "file", "new")
    assert {path.read_text() for path in tmp_path.iterdir()} == {"mine", "new"}


def test_the_target_of_a_link_is_written(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere" / "file")
    for text in ("made", "replaced"):
        write_text(link, text)
        assert link.is_symlink()
        assert (tmp_path / "elsewhere" / "file").read_text() == text


def test_a_name_as_long_as_the_system_allows(tmp_path: Path) -> None:
    write_text(tmp_path / ("a" * 255), "text")
    with pytest.raises(UltraMemError, match=r"cannot be written \(File name too long\)"):
        check_output(tmp_path / ("a" * 256))


def make_nothing(path: Path) -> None:
    del path


def make_loop(path: Path) -> None:
    path.symlink_to(path)


def make_read_only(path: Path) -> None:
    path.touch()
    path.chmod(stat.S_IRUSR)


@pytest.mark.parametrize(
    ("make", "below", "reason"),
    [
        (make_nothing, "file", "No such file or directory"),
        (Path.touch, "file", "Not a directory"),
        (Path.mkdir, "", "Is a directory"),
        (os.mkfifo, "", "not a regular file"),
        (make_loop, "", "Too many levels of symbolic links"),
        (make_read_only, "", "Permission denied"),
    ],
)
def test_an_output_that_cannot_be_written_is_found_out_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: object, below: str, reason: str
) -> None:
    make(tmp_path / "place")  # type: ignore[operator]
    mode = os.lstat(tmp_path / "place").st_mode if make is not make_nothing else 0
    monkeypatch.setattr(os, "access", lambda path, how: mode & stat.S_IWUSR)  # also for root, who may write all
    path = tmp_path / "place" / below
    with pytest.raises(UltraMemError) as caught:
        check_output(path)
    assert str(caught.value).startswith(f"{path} cannot be written ({reason}); choose another place")
    assert len(list(tmp_path.iterdir())) == (make is not make_nothing)


@pytest.mark.parametrize("path", ["", "/", "..", "/dev/null"])
def test_places_without_a_name_and_devices(path: str) -> None:
    with pytest.raises(UltraMemError, match=r"cannot be written \((Is a directory|not a regular file)\)"):
        check_output(Path(path))


def test_a_directory_that_must_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *arguments: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UltraMemError, match=rf"^{tmp_path}/file cannot be written \(Read-only file system\)"):
        check_output(tmp_path / "file")


def test_checking_changes_nothing(tmp_path: Path) -> None:
    check_output(tmp_path / "new")
    assert not any(tmp_path.iterdir())
    path = tmp_path / "old"
    path.write_text("mine")
    with pytest.raises(UltraMemError, match=r"old is a file that ultramem did not write; choose another name"):
        check_output(path, lambda path: path.read_text() == "ours")
    check_output(path, lambda path: path.read_text() == "mine")
    assert path.read_text() == "mine"
    path.write_text("")  # nothing to lose
    check_output(path, lambda path: False)
    assert list(tmp_path.iterdir()) == [path]


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    """Not /dev/null, which renaming would make a file of."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(OSError, match="not a regular file"):
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
        read_bytes(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # lets the writer open it at once
    with pipe.open("w") as file:
        writer = threading.Timer(0.1, lambda: (file.write("ä" * 10_000), file.close()))
        writer.start()
        assert read_bytes(pipe) == ("ä" * 10_000).encode()
        writer.join()
    os.close(reader)
    with pytest.raises(OSError, match="it is a device"):
        read_bytes(Path("/dev/zero"))
