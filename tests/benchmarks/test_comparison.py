"""The comparison of systems, of tiny runs: what it writes, and what it does when it is run again."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import comparison
from ultramem.cli import app
from ultramem.errors import UltraMemError
from ultramem.evaluation import evaluate
from ultramem.training.run import RunResult

CONFIG = """
data: {directory: tokens, sequence_length: 32}
trainer: {directory: runs, steps: 3, batch_size: 128, metrics_interval: 1, evaluate_tokens: 256, device: cpu}
"""


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """Runs the script in a directory with tokens and a configuration."""
    monkeypatch.chdir(tmp_path)
    for number in range(40):
        Path(f"text{number}.txt").write_text(" ".join(f"word{number * place % 17}" for place in range(80)))
    arguments = ["tokenize", *map(str, Path().glob("*.txt")), "--train-bpe", "300", "--heldout", "0.2"]
    tokenized = CliRunner().invoke(app, [*arguments, "--output", "tokens"])
    assert tokenized.exit_code == 0, tokenized.output
    Path("config.yaml").write_text(CONFIG)

    def run(*arguments):
        given = ["--size", "small", "--config", "config.yaml", "--directory", "runs", *arguments]
        monkeypatch.setattr(sys, "argv", ["comparison", *given])
        comparison.main()

    return run


def test_results(compare, capsys):
    compare("dense", "ultramem_v2-decaying:3")
    decaying = " --model.memory.optimizer=adamw --model.memory.value_lr=null --model.memory.value_lr_multiplier=8"
    for model, seed, overrides in (("dense", 0, ""), ("ultramem_v2-decaying", 3, decaying)):
        name = f"{model}-seed{seed}"
        result = json.loads(Path(f"runs/results/{name}.json").read_text())
        seeds = f" --model.seed={seed} --trainer.seed={seed}" if seed else ""
        system = model.partition("-")[0]
        given = f"--model.preset={system}_small{overrides}{seeds} --trainer.directory=runs/{name}"
        assert result["command"] == f"ultramem train config.yaml {given}"
        assert (result["model"], result["seed"], result["deterministic"]) == (model, seed, False)
        assert result["train_tokens"] == 3 * 128
        assert result["heldout"]["loss"] == pytest.approx(evaluate(Path("runs") / name).loss, rel=1e-5)
        assert result["tokens_per_second"] > 0
        assert [step for step, _ in result["curves"]["heldout"]] == [3]
    assert Path("runs/report.html").is_file()
    assert "dense-seed0" in capsys.readouterr().out


def test_goes_on_where_it_was(compare):
    compare("dense")
    path = Path("runs/results/dense-seed0.json")
    written = path.stat().st_mtime_ns
    compare("dense", "dense:1")
    assert path.stat().st_mtime_ns == written
    assert Path("runs/results/dense-seed1.json").is_file()


def test_results_of_other_settings_are_refused(compare):
    compare("dense")
    with pytest.raises(UltraMemError, match=r"dense-seed0.json is of another command or other tasks"):
        compare("dense", "--trainer.steps=4")


def test_unknown_row(compare, capsys):
    with pytest.raises(SystemExit):
        compare("densest")
    assert "'densest': name one of dense, olmoe" in capsys.readouterr().err


def test_runs_of_one_step_have_no_speed(compare):
    compare("dense", "--trainer.steps=1")
    assert json.loads(Path("runs/results/dense-seed0.json").read_text())["tokens_per_second"] is None


def test_an_interrupted_run_has_no_results(compare, monkeypatch):
    def interrupted(config):
        return RunResult(config.trainer.directory, 2, "interrupted")

    monkeypatch.setattr(comparison, "train", interrupted)
    with pytest.raises(UltraMemError, match="dense-seed0 was interrupted at step 2; run the same command again"):
        compare("dense")
    assert not Path("runs/results/dense-seed0.json").exists()
