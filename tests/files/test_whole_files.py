"""Files are replaced whole, directories have one writer, and links are removed without what they point to."""

from __future__ import annotations

from pathlib import Path

import pytest

from ultramem.errors import UltraMemError
from ultramem.files import whole_files


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    whole_files.write_text(path, "änderung 1")
    assert path.read_bytes() == "änderung 1".encode()

    def write_half(self: Path, text: str, encoding: str) -> None:
        self.write_bytes(text.encode()[:4])
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write_half)
        with pytest.raises(OSError, match="disk full"):
            whole_files.write_text(path, "änderung 2")
    assert path.read_text(encoding="utf-8") == "änderung 1"
    assert list(tmp_path.iterdir()) == [path]


def test_the_first_error_is_the_one_raised(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as caught:
        whole_files.write_text(tmp_path / "file" / "below", "")
    assert caught.value.__context__ is None


def test_one_holds_the_lock(tmp_path: Path) -> None:
    with (
        whole_files.locked(tmp_path, "taken"),
        pytest.raises(UltraMemError, match=r"^taken$"),
        whole_files.locked(tmp_path, "taken"),
    ):
        pass
    with pytest.raises(BlockingIOError), whole_files.locked(tmp_path, "taken"):
        raise BlockingIOError  # of what is done inside: not the lock's
    with whole_files.locked(tmp_path, "taken"):
        pass


def test_remove(tmp_path: Path) -> None:
    kept, directory = tmp_path / "kept", tmp_path / "directory"
    kept.mkdir()
    (directory / "below").mkdir(parents=True)
    (directory / "below" / "file").touch()
    link = tmp_path / "link"
    link.symlink_to(kept)
    for path in (directory, link):
        whole_files.remove(path)
    assert list(tmp_path.iterdir()) == [kept]
