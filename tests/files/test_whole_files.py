"""Files are replaced whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from ultramem.files.whole_files import write_text


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
