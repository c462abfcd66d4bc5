"""What version 0.1 wrote is still good: its run goes on, its checkpoint is measured and writes, its export loads."""

from __future__ import annotations

import json
import tarfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ultramem.hosts.transformers  # noqa: F401, registers the model
from ultramem.data.token_files import TOKEN_DIRECTORY
from ultramem.errors import UltraMemError
from ultramem.evaluation import SamplingConfig, TextGenerator, evaluate, find_checkpoint
from ultramem.files.directories import Product, partial_directory
from ultramem.hosts.transformers.files import MODEL_DIRECTORY
from ultramem.runs.directory import RunDirectory
from ultramem.training import load_config, train

ARCHIVE = Path(__file__).with_name("version_0_1.tar.xz")
LOSS, HELD_OUT_LOSS = "train/CE loss", "eval/heldout/CE loss"


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """The archive's content: `run`, at step 6 of 12, its `tokens`, `exported`, and what is expected of them."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("/released", str(tmp_path)))
    return tmp_path


@pytest.fixture
def expected(released: Path) -> dict[str, Any]:
    """Losses of the run as it went on without an interruption, and logits of its end, which was exported."""
    content: dict[str, Any] = json.loads((released / "expected.json").read_text())
    return content


def read_metrics(run: Path) -> dict[str, dict[str, float]]:
    """By step, as texts."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {str(line["step"]): line["metrics"] for line in lines}


def test_the_run_goes_on_as_if_it_had_not_stopped(released: Path, expected: dict[str, Any]) -> None:
    assert find_checkpoint(released / "run").step == 6
    result = train(load_config(released / "run" / "config.yaml"))
    assert (result.step, result.status) == (12, "finished")
    assert json.loads((released / "run" / "summary.json").read_text())["eos_token_id"] == 0
    metrics = read_metrics(released / "run")
    for step in map(str, range(7, 13)):
        assert metrics[step][LOSS] == pytest.approx(expected["losses"][LOSS][step], rel=1e-5)
    assert metrics["12"][HELD_OUT_LOSS] == pytest.approx(expected["losses"][HELD_OUT_LOSS]["12"], rel=1e-5)
    logits = TextGenerator.from_checkpoint(released / "run", "cpu").next_logits(expected["input_ids"])
    torch.testing.assert_close(logits, torch.tensor(expected["last_logits"]), rtol=1e-5, atol=1e-5)


def test_its_checkpoint_is_measured_and_writes(released: Path, expected: dict[str, Any]) -> None:
    result = evaluate(released / "run", max_tokens=512, device="cpu")
    assert (result.checkpoint, result.split) == ("step6", "heldout")
    # The windows are those of the evaluation in training.
    assert result.loss == pytest.approx(expected["losses"][HELD_OUT_LOSS]["6"], rel=1e-5)
    generator = TextGenerator.from_checkpoint(released / "run", "cpu")
    assert generator.tokenizer.eos_token_id == 0
    greedy = SamplingConfig(temperature=0, max_new_tokens=8)
    assert "".join(generator.stream("import", greedy)) == "".join(generator.stream("import", greedy)) != ""


def test_its_export_loads(released: Path, expected: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(released / "exported")
    with torch.no_grad():
        logits = model(torch.tensor([expected["input_ids"]])).logits[0, -1]
    torch.testing.assert_close(logits, torch.tensor(expected["last_logits"]), rtol=1e-5, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(released / "exported")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)


def test_what_it_wrote_is_known_as_ours(released: Path) -> None:
    """And so it may be replaced, as long as nothing of a user's is in it."""
    run = RunDirectory(load_config(released / "run" / "config.yaml"))
    assert run.others() == []
    for directory, product in (("tokens", TOKEN_DIRECTORY), ("exported", MODEL_DIRECTORY)):
        (released / directory / "notes.txt").touch()
        with pytest.raises(UltraMemError, match=r"also holds notes.txt"), partial(released / directory, product):
            pass
        (released / directory / "notes.txt").unlink()
        with partial(released / directory, product) as new:
            (new / product.marker).touch()
        assert [path.name for path in (released / directory).iterdir()] == [product.marker]
    run.claim(overwrite=True)
    assert [path.name for path in run.path.iterdir()] == ["config.yaml"]


def partial(output: Path, product: Product) -> AbstractContextManager[Path]:
    return partial_directory(output, overwrite=True, product=product)
