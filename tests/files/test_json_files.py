"""JSON files are written whole, and read where they can be understood."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ultramem.errors import UltraMemError
from ultramem.files import whole_files
from ultramem.files.json_files import read_json_object
from ultramem.files.whole_files import write_json


def test_written_and_read(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ä": [1, None]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "ä": [\n    1,\n    null\n  ]\n}\n'
    assert read_json_object(tmp_path / "a.json") == {"ä": [1, None]}


@pytest.mark.parametrize("content", ["", "[1]", "{", "\x00"])
def test_what_cannot_be_understood(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    assert read_json_object(tmp_path / "a.json") == {}
    assert read_json_object(tmp_path / "missing.json") == {}


def test_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UltraMemError, match=r"missing/a.json cannot be written \(No such file or directory\); choose"):
        write_json(tmp_path / "missing" / "a.json", {})

    def fail(path: Path, text: str) -> None:
        raise OSError("the server is gone")

    monkeypatch.setattr(whole_files, "write_text", fail)
    with pytest.raises(UltraMemError, match=r"a.json cannot be written \(the server is gone\); choose"):
        write_json(tmp_path / "a.json", {})


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(whole_files, "write_text", fail)
    with pytest.raises(UltraMemError, match=r"a.json cannot be written \(No space left on device\); free some space$"):
        write_json(tmp_path / "a.json", {})
