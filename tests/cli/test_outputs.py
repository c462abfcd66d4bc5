"""Every command finds out first whether its output can be written, and replaces nothing of the user's."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ultramem.cli import main
from ultramem.files import whole_files
from ultramem.runs.checkpoints import Checkpoint

CHECKPOINTS = Path(__file__).parents[1] / "golden" / "olmo_checkpoints"
Call = Callable[..., tuple[int, str, str]]
FILES = {  # commands that write a file
    "evaluate": ("evaluate", "RUN", "--device", "cpu", "--output", "OUTPUT"),
    "tasks": ("evaluate", "RUN", "--tasks", "piqa", "--max-questions", "5", "--device", "cpu", "--output", "OUTPUT"),
    "report": ("report", "RUN", "--output", "OUTPUT"),
    "facts": ("write-facts", "OUTPUT.jsonl", "--overwrite"),
}
DIRECTORIES = {  # commands that write a directory
    "export": ("export", "RUN", "OUTPUT", "--overwrite"),
    "import": ("import-olmo", str(CHECKPOINTS / "ultramem_v2"), "OUTPUT", "--overwrite"),
    "tokenize": ("tokenize", "TEXT", "--train-bpe", "300", "--output", "OUTPUT", "--overwrite"),
    "finetune": ("finetune", "RUN", "TEXT", "--background", "TEXT", "--output", "OUTPUT", "--overwrite"),
}


@pytest.fixture
def call(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command; returns the exit status and both outputs."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("some words " * 99)
    names = {"RUN": run.path, "TEXT": tmp_path / "text"}
    summary = dict.fromkeys(("flops_per_token", "bytes_per_token", "train_tokens"), 1)
    counts = ("total", "active", "total_without_embeddings", "active_without_embeddings")
    summary |= {"system": "ultramem_v2", "parameters": dict.fromkeys(counts, 1)}  # type: ignore[dict-item]
    (run.path / "summary.json").write_text(json.dumps(summary))
    (run.path / "metrics.jsonl").write_text('{"step": 1, "metrics": {"train/CE loss": 5.0, "train/tokens": 64}}\n')

    def call(arguments: tuple[str, ...], output: object = "") -> tuple[int, str, str]:
        given = [str(names.get(argument, argument)).replace("OUTPUT", str(output)) for argument in arguments]
        monkeypatch.setattr("sys.argv", ["ultramem", *given])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return call


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes long must not begin."""

    def work(*_: object, **__: object) -> None:
        pytest.fail("the work has begun")

    monkeypatch.setattr(Checkpoint, "load_model", work)
    monkeypatch.setattr("ultramem.report.page._run_page", work)
    monkeypatch.setattr("ultramem.data.facts.make_documents", work)
    monkeypatch.setattr("ultramem.data.tokenize._choose_tokenizer", work)
    monkeypatch.setattr("ultramem.convert.export.read_published_checkpoint", work)
    monkeypatch.setattr("ultramem.finetuning.run.read_texts", work)


@pytest.mark.parametrize("command", [*FILES, *DIRECTORIES])
@pytest.mark.parametrize("place", ["file/below", "long" * 99])
@pytest.mark.usefixtures("no_work")
def test_an_output_that_cannot_be_written(command: str, place: str, call: Call, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, _, errors = call((FILES | DIRECTORIES)[command], tmp_path / place)
    assert status == 1
    assert errors.startswith(f"error: {tmp_path / place}")
    assert "cannot be written (" in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("command", FILES)
@pytest.mark.usefixtures("no_work")
def test_a_file_of_the_users(command: str, call: Call, tmp_path: Path) -> None:
    place = tmp_path / ("thesis.jsonl" if command == "facts" else "thesis")
    place.write_text('{"title": "thesis"}')
    status, _, errors = call(FILES[command], tmp_path / "thesis")
    assert (status, errors) == (1, f"error: {place} is a file that ultramem did not write; choose another name\n")
    assert place.read_text() == '{"title": "thesis"}'


@pytest.mark.parametrize("command", DIRECTORIES)
@pytest.mark.parametrize("marker", ["config.json", "manifest.json", "notes.txt"])
@pytest.mark.usefixtures("no_work")
def test_a_directory_of_the_users(command: str, marker: str, call: Call, tmp_path: Path) -> None:
    place = tmp_path / "thesis"
    place.mkdir()
    (place / marker).write_text('{"title": "thesis"}')
    status, _, errors = call(DIRECTORIES[command], place)
    assert status == 1
    assert errors.startswith(f"error: {place} ")
    assert errors.endswith("; choose another directory\n")
    assert [path.name for path in place.iterdir()] == [marker]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    "arguments", [("evaluate", "RUN"), ("evaluate", "RUN", "--tasks", "piqa"), ("generate", "RUN", "--save")]
)
@pytest.mark.usefixtures("no_work")
def test_the_default_output(arguments: tuple[str, ...], call: Call, run: Any) -> None:
    name = {"RUN": "evaluation.json", "piqa": "tasks.json", "--save": "samples.json"}[arguments[-1]]
    (run.path / name).mkdir()
    status, _, errors = call(arguments)
    assert status == 1
    assert errors.startswith(f"error: {run.path / name} cannot be written (Is a directory); ")


def test_token_files_need_no_output(call: Call, run: Any) -> None:
    (run.path / "evaluation.json").mkdir()
    status, printed, _ = call(("evaluate", "RUN", "--data", str(run.data / "heldout" / "part-00000.npy")))
    assert status == 0
    assert "perplexity" in printed


@pytest.mark.parametrize("command", ["evaluate", "tasks"])
def test_what_was_computed_is_printed_if_it_cannot_be_saved(
    command: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(whole_files, "write_text", full)
    status, printed, errors = call(FILES[command], tmp_path / "results.json")
    assert status == 1
    assert ("perplexity" if command == "evaluate" else "piqa") in printed
    expected = f"error: {tmp_path}/results.json cannot be written (No space left on device); free some space\n"
    assert errors.endswith(expected)


def test_a_report_on_a_run_that_does_not_exist(call: Call, tmp_path: Path) -> None:
    status, _, errors = call(("report", str(tmp_path / "typo")))
    assert (status, errors) == (
        1,
        f"error: {tmp_path}/typo does not exist; give the trainer.directory of `ultramem train`\n",
    )


def test_results_are_replaced_by_results(call: Call, tmp_path: Path) -> None:
    for _ in range(2):
        assert call(FILES["report"], tmp_path / "report.html")[0] == 0
        assert call(FILES["evaluate"], tmp_path / "results.json")[0] == 0


@pytest.mark.parametrize("relation", ["same", "inside", "around", "through a link"])
@pytest.mark.usefixtures("no_work")
def test_an_output_that_is_read(relation: str, call: Call, tmp_path: Path) -> None:
    text = tmp_path / "text"
    (tmp_path / "link").symlink_to(text)
    places = {"same": text, "inside": text / "tokens", "around": tmp_path, "through a link": tmp_path / "link"}
    for command in ("tokenize", "finetune"):
        status, _, errors = call(DIRECTORIES[command], places[relation])
        assert status == 1
        assert errors.count("\n") == 1
        assert "is in, or holds," in errors
    assert [path.name for path in text.iterdir()] == ["a.txt"]


def test_training_over_a_run_says_what_it_keeps(call: Call, run: Any, tmp_path: Path) -> None:
    (run.path / "step7-analysis").mkdir()
    (run.path / "notes.txt").write_text("mine")
    config = shutil.copy(run.path / "config.yaml", tmp_path / "config.yaml")
    arguments = ("train", str(config), "--trainer.steps=1", "--trainer.evaluate_interval=null", "--overwrite")
    status, printed, _ = call(arguments)
    assert status == 0
    assert "kept, as ultramem did not write it: notes.txt, step7-analysis/\n" in printed
    assert sorted(path.name for path in run.path.glob("step*")) == ["step1", "step7-analysis"]
