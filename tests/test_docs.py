"""What the documents say is so: the reference is up to date, examples run, and names are of things that exist."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
import shlex
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
import yaml
from benchmarks.comparison_page import fill, read_runs
from transformers import PreTrainedTokenizerFast

from ultramem.cli import app
from ultramem.configuration.decoding import dotted_keys
from ultramem.data.tokenizers import END_OF_TEXT, train_bpe
from ultramem.errors import UltraMemError
from ultramem.hosts.olmo_core import PRESETS
from ultramem.hosts.transformers import UltraMemConfig, UltraMemForCausalLM
from ultramem.training import RunConfig, load_config

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
KEYS = {*dotted_keys(RunConfig), "model.preset"}
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors are slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def generator() -> dict:
    return runpy.run_path(str(ROOT / "docs" / "generate_configuration.py"))


def blocks(document: Path, language: str = r"\w*") -> list[str]:
    """Code blocks, without their fences."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def code(document: Path) -> list[str]:
    """Code spans, and the lines of code blocks with continued ones joined."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks(document)).replace("\\\n", " ").splitlines()
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)] + lines


def test_tables_of_the_comparison_are_those_of_its_data() -> None:
    page = (ROOT / "docs" / "comparison.md").read_text()
    assert fill(page, read_runs(ROOT / "docs" / "comparison")) == page
    losses = defaultdict(list)
    for path in (ROOT / "docs" / "comparison").glob("*.json"):
        losses[path.name.partition("-seed")[0]].append(json.loads(path.read_text())["heldout"]["loss"])
    assert losses.keys() >= {"dense", "olmoe", "pkm", "memory_plus", "ultramem", "ultramem_v2"}
    for seeds in losses.values():
        assert re.search(rf"\| {sum(seeds) / len(seeds):.4f} [|±]", page)


def test_a_row_of_the_comparison_is_the_same_when_it_is_repeated() -> None:
    results = ROOT / "docs" / "comparison"
    first, again = (json.loads((path / "dense-seed0.json").read_text()) for path in (results, results / "repeated"))
    for part in ("command", "heldout", "curves"):
        assert first[part] == again[part]


def test_configuration_reference_is_up_to_date(generator: dict) -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == generator["page"](), "run `make docs`"


def test_every_field_is_documented_and_nothing_else(generator: dict) -> None:
    kinds = [RunConfig, *(kind for _, kind in generator["sections"](RunConfig))]
    assert {kind.__name__ for kind in kinds} >= {"ModelConfig", "MemoryConfig", "MoEConfig", "TrainerConfig"}
    for kind in kinds:
        assert set(generator["descriptions"](kind)) == {field.name for field in dataclasses.fields(kind)}, kind


def test_a_field_without_description_is_named(generator: dict) -> None:
    @dataclasses.dataclass
    class Config:
        """A configuration.

        Attributes:
            described: yes.
        """

        described: int = 0
        forgotten: int = 0

    with pytest.raises(UltraMemError, match=r"Config\.forgotten"):
        generator["descriptions"](Config)


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with a model and its tokenizer in `exported`."""
    monkeypatch.chdir(tmp_path)
    words = PreTrainedTokenizerFast(tokenizer_object=train_bpe(["def main("], 258).tokenizer, eos_token=END_OF_TEXT)
    words.pad_token, words.padding_side = END_OF_TEXT, "left"
    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    memory = {"num_keys": 8, "key_dim": 8, "value_dim": 8, "top_k": 4}
    config = UltraMemConfig(num_attention_heads=2, num_key_value_heads=2, memory=memory, **sizes)
    UltraMemForCausalLM(config).save_pretrained("exported")
    words.save_pretrained("exported")


@pytest.mark.parametrize("name", ["own_model", "retrofit"])
def test_readme_shows_the_examples_as_they_are(name: str) -> None:
    assert (ROOT / "examples" / f"{name}.py").read_text() in blocks(ROOT / "README.md", "python")


def test_the_retrofit_learns(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / "retrofit.py"))
    before, after = re.findall(r"\d+\.\d+", capsys.readouterr().out)
    assert float(after) < float(before) - 1


def test_the_example_learns(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    runpy.run_path(str(ROOT / "examples" / "own_model.py"))
    losses = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < losses[0] / 4


@pytest.mark.usefixtures("exported")
def test_python_in_the_documents_runs() -> None:
    for document in (ROOT / "docs").glob("*.md"):
        names: dict = {}
        for block in blocks(document, "python"):
            exec(compile(block, document.name, "exec"), names)


@each_document
@pytest.mark.usefixtures("exported")
def test_yaml_has_keys_that_exist(document: Path, tmp_path: Path) -> None:
    for block in blocks(document, "yaml"):
        file = tmp_path / "run.yaml"
        file.write_text(block)
        content = yaml.safe_load(block)
        if "initial_weights" in content.get("trainer", ()):
            load_config(file)
        elif "trainer" in content:
            load_config(file, ["--model.vocab_size=4096"])
        else:
            load_config(file, ["--model.preset=dense_small", "--trainer={directory: run, batch_size: 1024, steps: 1}"])


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)", text, flags=re.MULTILINE):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path) if path else document
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


@each_document
def test_files_exist(document: Path) -> None:
    folders = "src|tests|docs|configs|examples|benchmarks"
    for span in code(document):
        for path in re.findall(rf"(?<![\w/.-])((?:{folders})/[\w/.-]*\w)", span):
            if path.startswith("tests/") and "ultramem tokenize" in span:
                continue  # of the reader's project
            assert (ROOT / path).exists(), path


@each_document
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for span in code(document):
        for target in re.findall(r"^make ([\w-]+)", span):
            assert target in targets, span


@each_document
def test_commands_and_options_exist(document: Path) -> None:
    for span in code(document):
        match = re.search(r"(?:^|(?<!from) )ultramem(?:\.cli)? ([a-z]+(?:-[a-z]+)?)\b(.*)", span)
        if match is None:
            continue
        name, rest = match.groups()
        assert name in COMMANDS, span
        if name == "import-flags":
            continue  # the flags are another program's
        known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
        for word in shlex.split(rest, comments=True):
            option = word.partition("=")[0]
            if option.startswith("--"):
                assert option in known or (name == "train" and option.removeprefix("--") in KEYS), span


@each_document
def test_options_on_their_own_exist(document: Path) -> None:
    known = {option for command in COMMANDS.values() for parameter in command.params for option in parameter.opts}
    for span in code(document):
        if match := re.match(r"--([\w.-]+)", span):
            assert match[0] in known | {"--help"} or match[1] in KEYS, span


@each_document
def test_keys_exist(document: Path) -> None:
    for span in code(document):
        if match := re.match(r"((?:model|data|trainer|optimizer|schedule|logging)\.[a-z_.]+)(?:=.*)?$", span):
            assert match[1] in KEYS, span


@each_document
def test_presets_exist(document: Path) -> None:
    names = re.findall(
        r"\b(?:dense|olmoe|pkm|memory_plus|ultramem|ultramem_v2)_(?:\d+[mb]|[a-z]*(?:small|medium|tiny|large))\b",
        document.read_text(),
    )
    assert set(names) <= PRESETS.keys()


def test_every_preset_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert [name for name in PRESETS if f"`{name}`" not in text] == []
