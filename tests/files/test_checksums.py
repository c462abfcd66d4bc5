"""Damage to files is found, wherever it is."""

from __future__ import annotations

import json
import random
import zlib
from pathlib import Path

import pytest

from ultramem.errors import UltraMemError
from ultramem.files import checksums
from ultramem.files.checksums import Checksums, DamagedFileError, check_files


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with three files, one in pieces and one empty."""
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a").write_bytes(random.Random(0).randbytes(1000))
    (tmp_path / "b").write_bytes(b"text")
    (tmp_path / "empty").touch()
    Checksums.compute(tmp_path, ["below/a", "b", "empty"], {"below/a": [100, 600, 300]}).save()
    return tmp_path


def load(directory: Path) -> Checksums:
    found = Checksums.load(directory)
    assert found is not None
    return found


def test_file_names_the_pieces(directory: Path) -> None:
    content = (directory / "below" / "a").read_bytes()
    files = json.loads((directory / "checksums.json").read_text())["files"]
    cut = [content[:100], content[100:700], content[700:]]
    assert files["below/a"] == [[len(piece), f"{zlib.crc32(piece):08x}"] for piece in cut]
    assert files["b"] == [[4, f"{zlib.crc32(b'text'):08x}"]]
    assert files["empty"] == [[0, "00000000"]]


def test_unchanged(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(directory).check()
    monkeypatch.setattr(checksums, "READ_BYTES", 7)
    load(directory).check()
    content = (directory / "below" / "a").read_bytes()
    load(directory).check_piece("below/a", 100, content[100:700])


def test_every_flipped_bit_is_found(directory: Path) -> None:
    path, generator = directory / "below" / "a", random.Random(1)
    content = path.read_bytes()
    for _ in range(200):
        bit = generator.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(DamagedFileError, match="below/a is damaged"):
            load(directory).check(["below/a"])
        if 800 <= bit < 5600:
            with pytest.raises(DamagedFileError, match="below/a is damaged"):
                load(directory).check_piece("below/a", 100, bytes(flipped[100:700]))


@pytest.mark.parametrize("change", [b"", b"tex", b"text.", b"Text", None])
def test_other_lengths_and_missing_files(directory: Path, change: bytes | None) -> None:
    (directory / "b").unlink()
    if change is not None:
        (directory / "b").write_bytes(change)
    with pytest.raises(DamagedFileError, match=r"b is (damaged|missing)"):
        load(directory).check()
    load(directory).check(["below/a", "empty"])


def test_what_has_no_checksum(directory: Path) -> None:
    (directory / "c").touch()
    with pytest.raises(DamagedFileError, match="c has no checksum"):
        load(directory).check(["c"])
    with pytest.raises(DamagedFileError, match="a is damaged"):
        load(directory).check_piece("below/a", 50, b"text")


def test_none_of_version_0_1(tmp_path: Path) -> None:
    assert Checksums.load(tmp_path) is None


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "{}", '{"algorithm": "md5", "files": {}}', '{"algorithm": "crc32", "files": []}',
        '{"algorithm": "crc32", "files": {"b": [[4]]}}', '{"algorithm": "crc32", "files": {"b": [["4", "00"]]}}',
        '{"algorithm": "crc32", "files": {"b": [[4, "xy"]]}}', "[" * 100_000, "\udc80",
    ],
)  # fmt: skip
def test_damaged_itself(directory: Path, content: str) -> None:
    (directory / "checksums.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DamagedFileError, match=r"checksums.json is damaged"):
        Checksums.load(directory)


def test_not_readable(directory: Path) -> None:
    (directory / "checksums.json").unlink()
    (directory / "checksums.json").mkdir()
    with pytest.raises(UltraMemError, match=r"checksums.json cannot be read \(Is a directory\)"):
        Checksums.load(directory)


def test_check_files_compares_what_is_listed(directory: Path) -> None:
    (directory / "c").touch()
    check_files(directory, ["b", "c"], "copy it again")
    (directory / "b").write_text("texT")
    check_files(directory, ["below/a", "c"], "copy it again")
    on_purpose = r"if it was changed on purpose, remove .*checksums\.json"
    with pytest.raises(UltraMemError, match=rf"b is damaged: .*; copy it again; {on_purpose}$"):
        check_files(directory, ["b", "c"], "copy it again")
    (directory / "checksums.json").unlink()
    check_files(directory, ["b", "nothing"], "copy it again")


def test_check_files_that_cannot_be_read(directory: Path) -> None:
    (directory / "b").unlink()
    (directory / "b").mkdir()
    with pytest.raises(UltraMemError, match=r"b cannot be read \(Is a directory\)"):
        check_files(directory, ["b"], "copy it again")
