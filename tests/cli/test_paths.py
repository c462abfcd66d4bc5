"""Paths that cannot be what they are given for end in one line, whatever the command and the option."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from ultramem.cli import main
from ultramem.convert.export import export

# PATH is the bad one; the other names stand for what is right.
INPUTS = {
    "train": ["train", "PATH"],
    "train data.directory": ["train", "CONFIG", "--data.directory=PATH"],
    "train data.more_directories": ["train", "CONFIG", "--data.more_directories=[PATH]"],
    "train data.train_files": ["train", "CONFIG", "--data={train_files: [PATH], vocab_size: 9, eos_token_id: 0}"],
    "train trainer.initial_weights": ["train", "CONFIG", "--trainer.initial_weights=PATH"],
    "evaluate": ["evaluate", "PATH"],
    "evaluate --data": ["evaluate", "RUN", "--data", "PATH"],
    "generate": ["generate", "PATH"],
    "generate --prompt-file": ["generate", "RUN", "--prompt-file", "PATH"],
    "report": ["report", "PATH"],
    "export": ["export", "PATH", "OUT"],
    "finetune": ["finetune", "PATH", "TEXT", "-o", "OUT", "--method", "full"],
    "finetune data": ["finetune", "MODEL", "PATH", "-o", "OUT", "--method", "full"],
    "finetune --background": ["finetune", "MODEL", "TEXT", "-o", "OUT", "--background", "PATH"],
    "finetune --memory": ["finetune", "MODEL", "TEXT", "-o", "OUT", "--method", "full", "--memory", "PATH"],
    "import-olmo": ["import-olmo", "PATH", "OUT"],
    "tokenize": ["tokenize", "PATH", "-o", "OUT", "--train-bpe", "258"],
    "tokenize --tokenizer": ["tokenize", "TEXT", "-o", "OUT", "--tokenizer", "PATH"],
}
OUTPUTS = {
    "train trainer.directory": ["train", "CONFIG", "--trainer.directory=PATH", "--trainer.steps=1"],
    "evaluate --output": ["evaluate", "RUN", "--no-unigram", "--max-tokens", "16", "--output", "PATH"],
    "export": ["export", "RUN", "PATH"],
    "finetune --output": ["finetune", "MODEL", "TEXT", "-o", "PATH", "--method", "full", "--steps", "1"],
    "import-olmo": ["import-olmo", "PUBLISHED", "PATH"],
    "tokenize --output": ["tokenize", "TEXT", "-o", "PATH", "--tokenizer", "TOKENIZER"],
    "write-facts": ["write-facts", "PATH"],
}
PUBLISHED = Path(__file__).parents[1] / "golden" / "olmo_checkpoints" / "ultramem_v2"


@pytest.fixture
def places(run: Any, make_config: Any, tmp_path: Path) -> dict[str, str]:
    """What the names in the arguments stand for."""
    make_config(steps=1, directory="fresh").save(tmp_path / "config.yaml")
    (tmp_path / "text.txt").write_text("some text")
    export(run.path, tmp_path / "model")
    paths = {
        "CONFIG": tmp_path / "config.yaml",
        "RUN": run.path,
        "OUT": tmp_path / "out",
        "TEXT": tmp_path / "text.txt",
        "MODEL": tmp_path / "model",
        "PUBLISHED": PUBLISHED,
        "TOKENIZER": run.path / "tokenizer.json",
    }
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture
def bad(tmp_path: Path) -> dict[str, str]:
    """Bad paths of every kind."""
    root = tmp_path / "bad"
    root.mkdir()
    (root / "loop").symlink_to(root / "loop")
    (root / "file").write_text("text")
    os.mkfifo(root / "pipe")
    return {
        "root": "/",
        "in a loop": str(root / "loop" / "a"),
        "long name": str(root / ("a" * 300)),
        "long": str(root) + "/a" * 3000,
        "pipe": str(root / "pipe"),
        "device": "/dev/null",
        "in a file": str(root / "file" / "a"),
        "empty": "",
        "home of nobody": "~nobody",
        "loop": str(root / "loop"),
        "not Unicode": os.fsdecode(bytes(root) + b"/\xff"),
    }


def check_one_line(
    arguments: list[str], bad: dict[str, str], places: dict[str, str], monkeypatch: Any, capfd: Any
) -> None:
    for kind, path in bad.items():
        names = places | {"PATH": path}
        given = [re.sub("|".join(names), lambda match, names=names: names[match[0]], text) for text in arguments]
        monkeypatch.setattr("sys.argv", ["ultramem", *given])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capfd.readouterr().err
        assert ended.value.code == 1, (kind, printed)
        assert printed.startswith("error: "), kind
        assert printed.count("\n") == 1, (kind, printed)
        assert not Path(places["OUT"]).exists(), kind


@pytest.mark.parametrize("command", INPUTS)
def test_inputs(
    command: str,
    bad: dict[str, str],
    places: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if command in ("train data.more_directories", "train trainer.initial_weights"):
        del bad["empty"]  # none
    check_one_line(INPUTS[command], bad, places, monkeypatch, capfd)


@pytest.mark.parametrize("command", OUTPUTS)
def test_outputs(
    command: str,
    bad: dict[str, str],
    places: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """What is no directory or regular file stays what it is."""
    for usable in ("home of nobody", "loop", "not Unicode"):
        del bad[usable]  # where anything else than Unicode and ~ is a name like any other
    before = Path("/dev/null").stat().st_mode
    check_one_line(OUTPUTS[command], bad, places, monkeypatch, capfd)
    assert Path("/dev/null").stat().st_mode == before
    assert (tmp_path / "bad" / "pipe").is_fifo()


def test_nul(places: dict[str, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A command line cannot hold it, but YAML can."""
    bad = {"NUL": '"a\\0b"'}
    for name in ("train data.directory", "train trainer.initial_weights", "train data.train_files"):
        check_one_line(INPUTS[name], bad, places, monkeypatch, capfd)
    check_one_line(OUTPUTS["train trainer.directory"], bad, places, monkeypatch, capfd)


def test_unreadable(run: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """As an ordinary user meets it; to the superuser everything is readable."""

    def refuse(path: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    check_one_line(["evaluate", "PATH"], {"unreadable": str(run.path)}, {"OUT": "OUT"}, monkeypatch, capfd)
