"""Options of the commands with any value: the command works, or says in one line why not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from hostile import call, damaged, numbers, texts
from ultramem.cli import app
from ultramem.errors import ConfigError, UltraMemError

# What each command is called with, and its options of numbers and of texts; those for paths are not tested here.
COMMANDS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "tokenize": (
        ["TEXT", "--output", "OUT", "--train-bpe", "300"],
        ["eos-id", "heldout", "seed", "processes", "shard-tokens", "max-size", "near-duplicates"],
        ["eos-token", "pad-token", "text-field", "separator", "include", "exclude", "on-error"],
    ),
    "train": (["CONFIG"], ["trainer.steps", "model.memory.share_ratio", "optimizer.eps"], ["schedule.kind", "x"]),
    "evaluate": (["RUN"], ["max-tokens", "batch-size", "sequence-length"], ["split", "dtype", "device", "tasks"]),
    "generate": (
        ["RUN", "a"],
        ["max-new-tokens", "temperature", "top-k", "top-p", "seed", "num-samples"],
        ["device"],
    ),
    "export": (["RUN", "OUT"], ["max-shard-size"], ["dtype"]),
    "finetune": (
        ["RUN", "TEXT", "--output", "OUT", "--background", "TEXT"],
        [
            *("rows", "rank", "steps", "epochs", "batch-size", "sequence-length", "learning-rate", "seed"),
            "background-batches",
        ],
        ["method", "optimizer", "device", "text-field", "include"],
    ),
    "import-olmo": (["RUN", "OUT"], ["max-shard-size"], ["dtype"]),
    "import-flags": (
        ["--model.mem_knum=12"],
        [
            *("model.d_model", "model.n_layers", "model.mem_knn", "model.mem_share_ratio", "max_duration", "seed"),
            *("global_train_batch_size", "scheduler.t_warmup", "scheduler.t_max", "optimizer.eps", "save_interval"),
        ],
        ["model.mem_insert_way", "scheduler.units", "optimizer.betas", "precision", "run_name"],
    ),
}
options = st.sampled_from(list(COMMANDS)).flatmap(
    lambda name: st.tuples(
        st.just(name),
        st.sampled_from(COMMANDS[name][1]).flatmap(lambda option: st.tuples(st.just(option), numbers))
        | st.sampled_from(COMMANDS[name][1] + COMMANDS[name][2]).flatmap(
            lambda option: st.tuples(st.just(option), texts | numbers)
        ),
    )
)


@pytest.fixture(scope="module")
def places(shared_run: Any) -> Iterator[dict[str, str]]:
    """Paths by the words that stand for them; the commands' long work is left out."""
    directory = Path(shared_run.path).parent
    (directory / "text.txt").write_text("some text\n")

    def stop(*arguments: Any, **options: Any) -> None:
        raise UltraMemError("the work would begin here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ultramem.data.tokenize.tokenize", stop)
        patch.setattr("ultramem.training.train", stop)
        patch.setattr("ultramem.finetuning.finetune", stop)
        patch.setattr("ultramem.evaluation.generation.TextGenerator.stream", lambda *arguments: iter(["b"]))
        yield {
            "RUN": str(shared_run.path),
            "CONFIG": str(shared_run.path / "config.yaml"),
            "TEXT": str(directory / "text.txt"),
            "OUT": str(directory / "out"),
        }


def arguments_of(command: str, places: dict[str, str]) -> list[str]:
    return [command, *(places.get(word, word) for word in COMMANDS[command][0])]


@given(option=options)
def test_any_option(places: dict[str, str], option: tuple[str, tuple[str, str]]) -> None:
    command, (name, value) = option
    call(*arguments_of(command, places), f"--{name}={value}")


@given(
    line=damaged("--model.mem_knum=360 --model.mem_type=ultramem_v2 --max_duration=5e11T --optimizer.betas=[0.9,0.95]")
)
def test_any_flags(line: bytes) -> None:
    call("import-flags", line.decode(errors="replace"))


@given(name=st.text(st.characters(exclude_categories=["C"]), min_size=1), command=st.sampled_from(list(COMMANDS)))
def test_unknown_options(places: dict[str, str], name: str, command: str) -> None:
    call(*arguments_of(command, places), f"--{name}")


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [("evaluate", "--max-tokens", "5"), ("generate", "--seed", "1"), ("export", "--dtype", "float32")],
)
def test_an_option_given_twice_and_an_empty_one(places: dict[str, str], command: str, option: str, value: str) -> None:
    result = CliRunner().invoke(app, [*arguments_of(command, places), option, value, f"{option}={value}"])
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception) == f"{option}: is given twice; leave out one of them"
    result = CliRunner().invoke(app, [*arguments_of(command, places), f"{option}="])
    assert str(result.exception) == f"{option}='': must not be empty; leave it out"


def test_options_that_may_be_repeated(places: dict[str, str]) -> None:
    with_two = [*arguments_of("tokenize", places), "--include", "*.py", "--include", "*.txt"]
    assert str(CliRunner().invoke(app, with_two).exception) == "the work would begin here"


def test_an_override_given_twice(places: dict[str, str]) -> None:
    result = CliRunner().invoke(app, ["train", places["CONFIG"], "--trainer.steps=1", "--trainer.steps=2"])
    assert str(result.exception) == "--trainer.steps: is given twice; leave out one of them"
