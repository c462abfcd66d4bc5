"""An output directory is there whole or not at all, and nothing else is lost."""

from __future__ import annotations

import errno
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ultramem.errors import UltraMemError
from ultramem.files.checksums import Checksums
from ultramem.files.directories import MARK, Product, partial_directory

PRODUCT = Product(
    "manifest.json",
    lambda directory: (directory / "manifest.json").read_text() in ("old", "new"),
    re.compile(r"manifest\.json|a|deep/([0-9]+\.npy)?"),
)


def make(output: Path, content: str = "new", overwrite: bool = False, **options: Any) -> None:
    with partial_directory(output, overwrite, PRODUCT, **options) as directory:
        assert not any(directory.iterdir())
        (directory / "manifest.json").write_text(content)


def entries(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def content(output: Path) -> str:
    return (output / "manifest.json").read_text()


def test_made_at_the_end_parents_included(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "tokens"
    with partial_directory(output, False, PRODUCT) as directory:
        (directory / "a").write_text("a")
        assert not output.exists()
    assert entries(output) == ["a"]
    assert entries(output.parent) == ["tokens"]


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "tokens").mkdir()
    make(tmp_path / "tokens")
    assert content(tmp_path / "tokens") == "new"
    assert entries(tmp_path) == ["tokens"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UltraMemError("no (os error 28)"), ValueError()])
def test_nothing_is_left_after_an_exception(tmp_path: Path, error: BaseException) -> None:
    make(tmp_path / "tokens", "old")

    def fail() -> None:
        with partial_directory(tmp_path / "tokens", True, PRODUCT) as directory:
            (directory / "a").write_text("a")
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert caught.value is error
    assert entries(tmp_path) == ["tokens"]
    assert content(tmp_path / "tokens") == "old"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        Exception("No space left on device (os error 28)"),  # as of the packages safetensors and tokenizers
    ],
)
def test_a_full_disk(tmp_path: Path, error: Exception) -> None:
    def fail() -> None:
        with partial_directory(tmp_path / "tokens", True, PRODUCT):
            raise error

    with pytest.raises(UltraMemError, match=r"tokens cannot be written \(No space left on device.*; free some space"):
        fail()
    assert entries(tmp_path) == []


def kill(*_: object, **__: object) -> None:
    os._exit(9)


def killed(step: str, monkeypatch: pytest.MonkeyPatch, output: Path) -> None:
    """A run is killed before a step of the system: `rename` twice, `rmtree` after that."""
    child = os.fork()
    if child == 0:
        number = int(step.removeprefix("rename")) if step.startswith("rename") else 0
        original, calls = Path.rename, []

        def rename(self: Path, target: Path) -> Path:
            calls.append(target)
            return original(self, target) if len(calls) != number else kill()  # type: ignore[return-value]

        monkeypatch.setattr(Path, "rename", rename)
        if step == "rmtree":
            monkeypatch.setattr(shutil, "rmtree", kill)
        try:
            with partial_directory(output, True, PRODUCT) as directory:
                (directory / "manifest.json").write_text("new")
                (directory / "a").touch()
                if step == "within":
                    kill()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("step", ["within", "rename1", "rename2", "rmtree"])
def test_a_killed_run_loses_nothing_and_is_no_hindrance(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "tokens"
    make(output, "old")
    killed(step, monkeypatch, output)
    kept = output if output.exists() else tmp_path / "tokens.partial" / "old"
    assert content(kept) == ("new" if step == "rmtree" else "old")
    with suppress(UltraMemError), partial_directory(output, False, PRODUCT):  # gives back what was put aside
        raise UltraMemError
    assert content(output) == ("new" if step == "rmtree" else "old")
    make(output, overwrite=True)
    assert content(output) == "new"
    assert entries(output) == ["manifest.json"]
    assert entries(tmp_path) == ["tokens"]


@pytest.mark.parametrize("name", ["tokens.partial", "tokens.replaced"])
def test_a_users_directory_beside_it_is_safe(name: str, tmp_path: Path) -> None:
    mine = tmp_path / name
    mine.mkdir()
    (mine / "thesis.tex").write_text("precious")
    (mine / ".ultramem").write_text("my own notes on it")
    make(tmp_path / "other")
    if name == "tokens.partial":
        with pytest.raises(UltraMemError, match=r"tokens.partial is in the way, as no killed run left it; rename it"):
            make(tmp_path / "tokens")
    else:
        make(tmp_path / "tokens", "old")
        make(tmp_path / "tokens", overwrite=True)
    assert (mine / "thesis.tex").read_text() == "precious"


def test_what_else_is_in_the_way_of_the_partial_one(tmp_path: Path) -> None:
    partial = tmp_path / "tokens.partial"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / ".ultramem").write_text(MARK)
    partial.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UltraMemError, match="is in the way"):
        make(tmp_path / "tokens")
    partial.unlink()
    partial.touch()
    with pytest.raises(UltraMemError, match="is in the way"):
        make(tmp_path / "tokens")
    partial.unlink()
    partial.mkdir()  # empty: nothing to lose
    make(tmp_path / "tokens")


def test_what_a_user_puts_into_a_marked_directory_stays(tmp_path: Path) -> None:
    with partial_directory(tmp_path / "tokens", False, PRODUCT) as directory:
        (directory.parent / "notes.txt").write_text("mine")
    assert entries(tmp_path) == ["tokens", "tokens.partial"]
    assert entries(tmp_path / "tokens.partial") == ["notes.txt"]


def test_a_finished_output_is_kept_unless_overwritten(tmp_path: Path) -> None:
    make(tmp_path / "tokens", "old")
    with pytest.raises(UltraMemError, match="--overwrite"):
        make(tmp_path / "tokens")
    make(tmp_path / "tokens", "new", overwrite=True)
    assert content(tmp_path / "tokens") == "new"
    assert entries(tmp_path) == ["tokens"]


def test_other_directories_and_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(UltraMemError, match="is not empty and has no"):
        make(tmp_path / "mine", overwrite=True)
    with pytest.raises(UltraMemError, match="is a file"):
        make(tmp_path / "mine" / "thesis.tex", overwrite=True)
    (tmp_path / "mine" / "manifest.json").write_text("{}")
    with pytest.raises(UltraMemError, match=r"has a manifest.json that ultramem did not write"):
        make(tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize("name", ["notes.txt", "deep/notes.txt", "deep/12.npy.bak", "deep/b/1.npy", ".hidden"])
def test_one_that_holds_something_of_the_users_is_never_replaced(tmp_path: Path, name: str) -> None:
    make(tmp_path / "tokens", "old")
    for ours in ("deep/1.npy", name):
        (tmp_path / "tokens" / ours).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tokens" / ours).write_text("content")
    with pytest.raises(UltraMemError, match=r"tokens also holds (\S+), which would be lost") as caught:
        make(tmp_path / "tokens", overwrite=True)
    assert name.startswith(re.search(r"holds (\S+),", str(caught.value))[1])  # type: ignore[index]
    assert (tmp_path / "tokens" / name).read_text() == "content"
    assert entries(tmp_path) == ["tokens"]


def test_checksums_name_what_is_ours(tmp_path: Path) -> None:
    output = tmp_path / "tokens"
    make(output, "old")
    (output / "deep").mkdir()
    for name in ("x", "deep/y"):
        (output / name).write_text("content")
    Checksums.compute(output, ["manifest.json", "x", "deep/y"]).save()
    (output / "a").touch()  # ours by its name, but not of this output
    with pytest.raises(UltraMemError, match=r"also holds a, which would be lost"):
        make(output, overwrite=True)
    (output / "a").unlink()
    make(output, overwrite=True)
    assert entries(output) == ["manifest.json"]


def test_a_part_may_have_checksums_of_its_own(tmp_path: Path) -> None:
    output = tmp_path / "tokens"
    make(output, "old")
    for part in ("deep", "mine"):
        (output / part).mkdir()
        (output / part / "1.npy").touch()
        Checksums.compute(output / part, ["1.npy"]).save()
    Checksums.compute(output, ["manifest.json"]).save()
    with pytest.raises(UltraMemError, match=r"also holds mine/, which would be lost"):
        make(output, overwrite=True)
    shutil.rmtree(output / "mine")
    make(output, overwrite=True)
    assert entries(output) == ["manifest.json"]


def test_what_came_while_it_was_written_stays(tmp_path: Path) -> None:
    output = tmp_path / "tokens"
    make(output, "old")

    def write() -> None:
        with partial_directory(output, True, PRODUCT) as directory:
            (directory / "manifest.json").write_text("new")
            (output / "notes.txt").write_text("mine")

    with pytest.raises(UltraMemError, match=r"what was written is in .*, but not in its place \(.*holds notes.txt"):
        write()
    assert entries(output) == ["manifest.json", "notes.txt"]
    assert content(tmp_path / "tokens.partial" / "new") == "new"


def test_what_cannot_be_put_in_place_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "tokens"
    make(output, "old")
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(UltraMemError, match=r"what was written is in .*partial/new, but not in its place \(Device or"):
        make(output, overwrite=True)
    assert content(output) == "old"
    assert content(tmp_path / "tokens.partial" / "new") == "new"


def test_two_runs_do_not_share_an_output(tmp_path: Path) -> None:
    with partial_directory(tmp_path / "tokens", False, PRODUCT) as directory:
        (directory / "manifest.json").write_text("first")
        with pytest.raises(UltraMemError, match="another run is writing"):
            make(tmp_path / "tokens", "second")
    assert content(tmp_path / "tokens") == "first"


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "tokens").symlink_to(tmp_path / "disk" / "tokens")
    for text in ("old", "new"):
        make(tmp_path / "tokens", text, overwrite=True)
        assert (tmp_path / "tokens").is_symlink()
        assert content(tmp_path / "disk" / "tokens") == text
    assert entries(tmp_path) == ["disk", "tokens"]
    assert entries(tmp_path / "disk") == ["tokens"]


def test_places_that_hold_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, work = tmp_path / "home" / "me", tmp_path / "work" / "here"
    for directory in (home, work):
        directory.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    for output, reason in (
        (Path("/"), "is the root of a file system"),
        (Path("/proc"), "is the root of a file system"),
        (home, "is, or holds, the home directory"),
        (home.parent, "is, or holds, the home directory"),
        (Path(), "is, or holds, the working directory"),
        (Path(".."), "is, or holds, the working directory"),
        (work / "deep" / "..", "is, or holds, the working directory"),
    ):
        with pytest.raises(UltraMemError, match=reason):
            make(output, overwrite=True)
    make(home / "tokens")
    make(Path("tokens"))
    assert entries(work) == ["tokens"]


def test_apart_from_what_is_read(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(source)
    for output in (source, source / "deep", source / "new", tmp_path, tmp_path / "link" / "new"):
        with pytest.raises(UltraMemError, match=r"is in, or holds, .*source, which is read; choose another directory"):
            make(output, sources=[source, tmp_path / "other"])
    make(tmp_path / "source2", sources=[source])
    assert entries(source) == ["deep"]


@pytest.mark.parametrize("name", ["file/tokens", "a" * 255, "missing/" + "a" * 300, "loop", "loop/tokens"])
def test_one_that_cannot_be_made(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    reasons = "Not a directory|File name too long|Too many levels of symbolic links"
    with pytest.raises(UltraMemError, match=rf"cannot be written \(({reasons})\); choose"):
        make(tmp_path / name)
