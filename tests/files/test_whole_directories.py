"""An output directory is there whole or not at all, and nothing else is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from ultramem.errors import UltraMemError
from ultramem.files.directories import partial_directory


def make(output: Path, content: str = "new", overwrite: bool = False) -> None:
    with partial_directory(output, overwrite, marker="manifest.json") as directory:
        assert not any(directory.iterdir())
        (directory / "manifest.json").write_text(content)


def entries(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_made_at_the_end_parents_included(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "tokens"
    with partial_directory(output, overwrite=False, marker="manifest.json") as directory:
        (directory / "a").write_text("a")
        assert not output.exists()
    assert entries(output) == ["a"]
    assert entries(output.parent) == ["tokens"]


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "tokens").mkdir()
    make(tmp_path / "tokens")
    assert (tmp_path / "tokens" / "manifest.json").read_text() == "new"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_nothing_is_left_after_an_exception(tmp_path: Path, error: type[BaseException]) -> None:
    make(tmp_path / "tokens", "old")

    def fail() -> None:
        with partial_directory(tmp_path / "tokens", overwrite=True, marker="manifest.json") as directory:
            (directory / "a").write_text("a")
            raise error

    with pytest.raises(error):
        fail()
    assert entries(tmp_path) == ["tokens"]
    assert (tmp_path / "tokens" / "manifest.json").read_text() == "old"


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "tokens.partial" / "train").mkdir(parents=True)
    (tmp_path / "tokens.partial" / "train" / "part-00000.npy").write_text("cut")
    (tmp_path / "tokens.partial" / "tokenizer.json").write_text("old")
    make(tmp_path / "tokens")
    assert entries(tmp_path / "tokens") == ["manifest.json"]


def test_a_run_killed_while_it_replaced_another_is_no_hindrance(tmp_path: Path) -> None:
    make(tmp_path / "tokens", "old")
    make(tmp_path / "tokens.replaced", "older")
    make(tmp_path / "tokens", "new", overwrite=True)
    assert (tmp_path / "tokens" / "manifest.json").read_text() == "new"
    assert entries(tmp_path) == ["tokens"]


def test_a_finished_output_is_kept_unless_overwritten(tmp_path: Path) -> None:
    make(tmp_path / "tokens", "old")
    with pytest.raises(UltraMemError, match="--overwrite"):
        make(tmp_path / "tokens")
    make(tmp_path / "tokens", "new", overwrite=True)
    assert (tmp_path / "tokens" / "manifest.json").read_text() == "new"
    assert entries(tmp_path) == ["tokens"]


def test_other_directories_and_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UltraMemError, match="is not empty and has no"):
        make(tmp_path, overwrite=True)
    with pytest.raises(UltraMemError, match="is a file"):
        make(tmp_path / "thesis.tex", overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_two_runs_do_not_share_an_output(tmp_path: Path) -> None:
    with partial_directory(tmp_path / "tokens", overwrite=False, marker="manifest.json") as directory:
        (directory / "manifest.json").write_text("first")
        with pytest.raises(UltraMemError, match="another run is writing"):
            make(tmp_path / "tokens", "second")
    assert (tmp_path / "tokens" / "manifest.json").read_text() == "first"


def test_a_path_without_a_name_or_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path, reason in (
        (Path("/"), "/ has no name of its own; choose another directory"),
        (tmp_path / "..", "has no name of its own"),
        (tmp_path / "loop", "loop is a link to nothing; remove it"),
        (tmp_path / "dangling", "dangling is a link to nothing; remove it"),
    ):
        with pytest.raises(UltraMemError, match=reason):
            make(path)
    assert entries(tmp_path) == ["dangling", "loop"]
