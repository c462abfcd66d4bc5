"""Whether data is a checkpoint's own, by its contents, and which options apply to it."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ultramem.data.token_files import load_manifest
from ultramem.errors import ConfigError, UltraMemError
from ultramem.evaluation import evaluate
from ultramem.evaluation.data import EvaluationData, find_data
from ultramem.runs.checkpoints import find_checkpoint
from ultramem.runs.contents import DataContents
from ultramem.runs.tokens import open_token_data


def find(run: Any, *paths: Path, **options: Any) -> EvaluationData:
    return find_data(find_checkpoint(run.path), paths, **options)


def record(run: Any) -> None:
    """As `ultramem train` does at its start."""
    data = open_token_data(find_checkpoint(run.path).config.data)
    content = {"eos_token_id": 0, "data": asdict(DataContents.of(data, verify=True))}
    (run.path / "summary.json").write_text(json.dumps(content))


def change_token(directory: Path, split: str = "heldout") -> None:
    path = directory / split / "part-00000.npy"
    tokens = np.fromfile(path, dtype="<u2")
    tokens[3] = (tokens[3] + 1) % 258
    tokens.tofile(path)


@pytest.mark.parametrize("recorded", [True, False])
def test_by_content(run: Any, tmp_path: Path, recorded: bool) -> None:
    if recorded:
        record(run)
    copy = shutil.copytree(run.data, tmp_path / "copy")
    assert find(run).other is None
    assert find(run, copy).other is None
    assert find(run, copy, split="train").other is None
    change_token(copy)
    found = find(run, copy)
    assert (found.name, found.other) == ("heldout", str(copy))
    assert find(run, copy, split="train").other is None
    change_token(copy, "train")
    assert find(run, copy, split="train").other == str(copy)
    files = sorted((run.data / "heldout").glob("*.npy"))
    found = find(run, *files)
    assert (found.name, found.other) == ("files", ", ".join(map(str, files)))


def test_fewer_files(run: Any, tmp_path: Path) -> None:
    record(run)
    copy = shutil.copytree(run.data, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["splits"]["heldout"]["files"].pop()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert find(run, copy).other == str(copy)


def test_unknown_after_a_run_of_version_0_1_whose_data_has_moved(run: Any, tmp_path: Path) -> None:
    moved = run.data.rename(tmp_path / "moved")
    assert find(run, moved).other == str(moved)


def test_own_data_that_has_changed(run: Any) -> None:
    record(run)
    change_token(run.data)
    assert find(run, split="train").other is None
    with pytest.raises(UltraMemError, match=r"heldout/part-00000.npy has changed since the run began; restore it"):
        find(run)
    assert find(run, run.data).other == str(run.data)  # as one's own choice


def test_a_run_on_several_directories(run: Any, tmp_path: Path) -> None:
    other = shutil.copytree(run.data, tmp_path / "other")
    run.change_config(f"directory: {run.data}", f"directory: {run.data}\n  more_directories: [{other}]")
    record(run)
    assert find(run, split="train").other is None
    assert len(find(run, split="train").files) == 2


@pytest.mark.parametrize("recorded", [True, False])
def test_another_tokenizer(run: Any, tmp_path: Path, recorded: bool) -> None:
    if recorded:
        record(run)
        (run.path / "tokenizer.json").unlink()
    copy = shutil.copytree(run.data, tmp_path / "copy")
    text = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(text.replace('"a"', '"b"', 1))
    message = r"copy was made with another tokenizer than the data of .*run, .*; tokenize its text again with --token"
    with pytest.raises(UltraMemError, match=message):
        find(run, copy)
    run.data.rename(tmp_path / "old")
    copy.rename(run.data)
    with pytest.raises(UltraMemError, match="was made with another tokenizer"):
        find(run)


def test_damage_is_found_unless_verify_is_off(run: Any) -> None:
    load_manifest(run.data).save_checksums()
    record(run)
    change_token(run.data)
    with pytest.raises(UltraMemError, match=r"heldout/part-00000.npy is damaged: it differs from its checksum"):
        find(run)
    run.change_config(f"directory: {run.data}", f"directory: {run.data}\n  verify: false")
    assert find(run).other is None  # its checksums are believed


def test_the_unigram_model_is_of_checked_tokens(run: Any) -> None:
    load_manifest(run.data).save_checksums()
    change_token(run.data, "train")
    evaluate(run.path, unigram=False)
    with pytest.raises(UltraMemError, match=r"train/part-00000.npy is damaged: it differs from its checksum"):
        evaluate(run.path)


def test_options_that_do_not_apply(run: Any) -> None:
    files = sorted((run.data / "heldout").glob("*.npy"))
    for paths in ((run.data, run.data), (run.data, files[0]), (files[0], run.data)):
        with pytest.raises(ConfigError, match=rf"^data={paths[0]}, {paths[1]}: must be one directory, or token files$"):
            find(run, *paths)
    for paths in ((), (run.data,)):
        with pytest.raises(ConfigError, match="dtype=uint16: applies only to token files given as data; leave it out"):
            find(run, *paths, dtype="uint16")
    with pytest.raises(ConfigError, match="split=heldout: does not apply to token files given as data; leave it out"):
        find(run, files[0], split="heldout")
