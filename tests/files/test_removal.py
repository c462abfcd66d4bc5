"""Links are removed without what they point to."""

from __future__ import annotations

from pathlib import Path

from ultramem.files.directories import remove


def test_remove(tmp_path: Path) -> None:
    kept, directory = tmp_path / "kept", tmp_path / "directory"
    kept.mkdir()
    (directory / "below").mkdir(parents=True)
    (directory / "below" / "file").touch()
    link = tmp_path / "link"
    link.symlink_to(kept)
    for path in (directory, link):
        remove(path)
    assert list(tmp_path.iterdir()) == [kept]
