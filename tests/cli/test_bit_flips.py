"""Flipped bits in a token directory and an exported one: noticed by what reads them, or without an effect."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ultramem.cli import app
from ultramem.data.tokenize import TokenizeConfig, tokenize
from ultramem.errors import UltraMemError
from ultramem.hosts.transformers.files import load_model_and_tokenizer
from ultramem.runs.config import DataConfig
from ultramem.runs.contents import DataContents
from ultramem.runs.tokens import open_token_data


def read_tokens(directory: Path) -> Any:
    """What `train` and `evaluate` know before they read tokens, and the tokens."""
    data = open_token_data(DataConfig(directory, 16))
    return data, DataContents.of(data, verify=True), [path.read_bytes() for path in (*data.train, *data.heldout)]


def read_model(directory: Path) -> Any:
    """What `finetune` reads: all that the library reads of a model's directory."""
    model, tokenizer = load_model_and_tokenizer(directory)
    state = {name: (tensor.dtype, tensor.numpy().tobytes()) for name, tensor in model.state_dict().items()}
    configs = model.config.to_json_string(), model.generation_config.to_json_string()
    return state, configs, tokenizer.backend_tokenizer.to_str(), str(tokenizer)


def flip_bits(directory: Path, read: Callable[[Path], Any], flips: int, seed: int) -> Counter[tuple[str, str]]:
    """Flip a bit of each file, several times.

    Returns:
        how often, by file, the outcome was `noticed`, `harmless`, as what is read is the same, or `changed`.
    """
    choose, expected, outcomes = random.Random(seed), read(directory), Counter[tuple[str, str]]()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for _ in range(flips):
            flipped, bit = bytearray(content), choose.randrange(8 * len(content))
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            try:
                outcome = "harmless" if read(directory) == expected else "changed"
            except UltraMemError:
                outcome = "noticed"
            outcomes[path.relative_to(directory).as_posix(), outcome] += 1
        path.write_bytes(content)
    return outcomes


def write_tokens(directory: Path) -> Path:
    """As `ultramem tokenize` writes them."""
    text = [f"line {line} of a text: {line * line}" for line in range(400)]
    (directory / "text.txt").write_text("\n---\n".join(text))
    config = TokenizeConfig(
        sources=(directory / "text.txt",), output=directory / "written", separator="---", train_bpe=270, heldout=0.2
    )
    return tokenize(config).directory


def export(run: Any, directory: Path) -> Path:
    """As `ultramem export` writes it."""
    result = CliRunner().invoke(app, ["export", str(run.path), str(directory)])
    assert result.exit_code == 0, result.output
    return directory


def test_token_directory(tmp_path: Path) -> None:
    outcomes = flip_bits(write_tokens(tmp_path), read_tokens, flips=8, seed=0)
    assert {name for name, outcome in outcomes if outcome != "noticed"} <= {"checksums.json"}
    assert {outcome for _, outcome in outcomes} <= {"noticed", "harmless"}
    assert sum(outcomes.values()) == 8 * 7


def test_exported_directory(run: Any, tmp_path: Path) -> None:
    outcomes = flip_bits(export(run, tmp_path / "model"), read_model, flips=5, seed=0)
    unread = {"README.md", "modeling_ultramem.py"}
    assert {name for name, outcome in outcomes if outcome != "noticed"} <= {*unread, "checksums.json"}
    assert {outcome for _, outcome in outcomes} <= {"noticed", "harmless"}
    assert sum(outcomes.values()) == 5 * 8


@pytest.mark.parametrize("name", ["tokens", "model"])
def test_noticed_by_commands(name: str, run: Any, tmp_path: Path) -> None:
    arguments: list[object]
    if name == "tokens":
        directory = write_tokens(tmp_path)
        damaged, arguments = "heldout/part-00000.npy", ["evaluate", run.path, "--data", directory]
        (run.path / "tokenizer.json").unlink()
    else:
        directory = export(run, tmp_path / "model")
        damaged = "tokenizer.json"
        arguments = ["tokenize", run.path / "config.yaml", "--tokenizer", directory, "-o", tmp_path / "out"]
    content = bytearray((directory / damaged).read_bytes())
    content[40] ^= 1
    (directory / damaged).write_bytes(content)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert isinstance(result.exception, UltraMemError)
    assert f"{damaged} is damaged: it differs from its checksum" in str(result.exception)


def test_harmless_flips_leave_the_same_model(run: Any, tmp_path: Path) -> None:
    """The measure of the tests above tells models apart."""
    directory = export(run, tmp_path / "model")
    expected = read_model(directory)
    assert read_model(directory) == expected
    model, _ = load_model_and_tokenizer(directory)
    with torch.no_grad():
        model.memory.layers[0].keys.view(-1)[0] += 1e-3
    model.save_pretrained(directory)
    assert read_model(directory) != expected
