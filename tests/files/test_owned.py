"""What is ours is told by name, and nothing else is removed."""

from __future__ import annotations

import re
from pathlib import Path

from ultramem.files.owned import divide, others_in, remove_ours

OURS = re.compile(r"a/(b/)?([0-9]+)?|list").fullmatch


def make(directory: Path, *names: str) -> None:
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.touch()


def test_ours_and_others(tmp_path: Path) -> None:
    make(tmp_path, "a/1", "a/b/22", "a/b/notes", "c/1", "list", "3", "a/4/")
    ours, others = divide(tmp_path, OURS)
    assert ours == ["a/1", "a/b/22", "a/b/", "a/", "list"]
    assert others == ["3", "a/4/", "a/b/notes", "c/"]


def test_removes_ours_and_the_directories_that_held_nothing_else(tmp_path: Path) -> None:
    make(tmp_path, "a/1", "a/b/22", "list", "c/1")
    remove_ours(tmp_path, OURS)
    assert [path.name for path in tmp_path.rglob("*")] == ["c", "1"]
    make(tmp_path, "a/1", "a/b/22", "a/b/notes")
    remove_ours(tmp_path, OURS)
    assert {path.name for path in tmp_path.rglob("*")} == {"a", "b", "notes", "c", "1"}


def test_links_are_not_followed(tmp_path: Path) -> None:
    make(tmp_path / "kept", "1", "b/2")
    run = tmp_path / "run"
    make(run, "a/2")
    (run / "a" / "b").symlink_to(tmp_path / "kept")  # a link is no directory of ours
    (run / "a" / "1").symlink_to(tmp_path / "kept" / "1")
    assert divide(run, OURS) == (["a/1", "a/2", "a/"], ["a/b"])
    remove_ours(run, OURS)
    assert [path.name for path in run.rglob("*")] == ["a", "b"]
    assert (tmp_path / "kept" / "1").is_file()
    assert (tmp_path / "kept" / "b" / "2").is_file()
    (tmp_path / "link").symlink_to(run)
    assert others_in(tmp_path / "link", OURS) == others_in(tmp_path / "kept" / "1", OURS) == ["."]
    assert others_in(tmp_path / "missing", OURS) == ["."]
