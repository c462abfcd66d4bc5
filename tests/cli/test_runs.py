"""`ultramem evaluate` and `ultramem generate` as a user runs them."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from ultramem.cli import main
from ultramem.configuration.decoding import decode
from ultramem.configuration.field_types import field_types
from ultramem.evaluation import evaluate
from ultramem.report.run import Parameters, ReportedSample
from ultramem.runs.results import LossResult


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit status of `ultramem` with these arguments."""
    monkeypatch.setattr("sys.argv", ["ultramem", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0)


def test_evaluate(run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "evaluate", run.path, "--device", "cpu") == 0
    content = json.loads((run.path / "evaluation.json").read_text())
    expected = evaluate(run.path)
    assert content["loss"] == expected.loss
    assert decode(LossResult, content).unigram_bits_per_byte == expected.unigram_bits_per_byte
    printed = capsys.readouterr().out
    for number in (expected.loss, expected.bits_per_byte, expected.unigram_bits_per_byte):
        assert f"{number:.4f}" in printed
    assert "tokens per second" in printed


def test_evaluate_options(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted((run.data / "heldout").glob("*.npy"))
    options = ["--data", files[0], "--data", files[1], "--dtype", "uint16", "--max-tokens", 50, "--batch-size", 2]
    options += ["--sequence-length", 8, "--no-unigram", "--output", run.path / "other.json"]
    assert call(monkeypatch, "evaluate", run.path / "step7", *options) == 0
    expected = evaluate(run.path, files[:2], max_tokens=50, sequence_length=8)
    assert json.loads((run.path / "other.json").read_text())["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert not (run.path / "evaluation.json").exists()


def test_evaluate_some_tokens(run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = run.path / "evaluation.json"
    assert call(monkeypatch, "evaluate", run.path) == 0
    assert f"written to {file}\n" in capsys.readouterr().out
    whole = file.read_text()
    assert call(monkeypatch, "evaluate", run.path, "--max-tokens", 33) == 0
    note = f"not written: {file} has step7 on all tokens; choose another file with --output\n"
    assert capsys.readouterr().out.endswith(note)
    assert file.read_text() == whole
    assert call(monkeypatch, "evaluate", run.path, "--max-tokens", 33, "--output", run.path / "some.json") == 0
    assert json.loads((run.path / "some.json").read_text())["complete"] is False
    assert file.read_text() == whole


def test_evaluate_several(run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    other = shutil.copytree(run.path, run.path.with_name("other"))
    (other / "step7").rename(other / "step8")
    assert call(monkeypatch, "evaluate", run.path, other) == 0
    printed = capsys.readouterr().out
    assert "run/step7" in printed
    assert "other/step8" in printed
    assert printed.count(f"{evaluate(run.path).loss:.4f}") == 2
    for path in (run.path, other):
        assert json.loads((path / "evaluation.json").read_text())["loss"] == evaluate(run.path).loss


def test_evaluate_tasks(run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    other = shutil.copytree(run.path, run.path.with_name("other"))
    options = ["--tasks", "openbook_qa,arc_easy", "--tasks", "arc_challenge", "--max-questions", 5, "--device", "cpu"]
    assert call(monkeypatch, "evaluate", run.path, other, *options) == 0
    content = json.loads((run.path / "tasks.json").read_text())
    assert content == json.loads((other / "tasks.json").read_text())
    assert {result["name"]: result["questions"] for result in content["results"]} == {
        "openbook_qa": 5,
        "arc_easy": 5,
        "arc_challenge": 5,
    }
    printed = capsys.readouterr().out
    assert "run/step7" in printed
    assert "other/step7" in printed
    assert printed.count("written to") == 2
    assert not (run.path / "evaluation.json").exists()


def test_generate(run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--max-new-tokens", 10, "--temperature", 1.2, "--top-k", 9, "--top-p", 0.9, "--seed", 4, "--save"]
    assert call(monkeypatch, "generate", run.path, "import", *options) == 0
    (sample,) = json.loads((run.path / "samples.json").read_text(encoding="utf-8"))
    assert capsys.readouterr().out.startswith(f"{sample['text']}\n")
    assert decode(ReportedSample, sample).settings == {"temperature": 1.2, "top-k": 9, "top-p": 0.9, "seed": 4}


def test_generate_several(run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = run.path / "prompt.txt"
    prompt.write_text("a [b] c\n")
    options = ["--prompt-file", prompt, "--num-samples", 2, "--max-new-tokens", 2]
    assert call(monkeypatch, "generate", run.path, "first", "second", *options) == 0
    printed = capsys.readouterr().out
    assert printed.count("--- sample") == 6
    assert printed.count("\nfirst") == printed.count("\nsecond") == printed.count("\na [b] c\n") == 2
    assert not (run.path / "samples.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "nothing"], "neither a run directory"),
        (["evaluate", "RUN/step8"], "step8 does not exist; complete ones are step7"),
        (["evaluate", "RUN", "--split", "test"], "no split 'test'"),
        (["evaluate", "RUN", "--max-tokens", "0"], "max_tokens=0"),
        (["evaluate", "RUN", "nothing"], "neither a run directory"),
        (["evaluate", "RUN", "RUN", "--output", "all.json"], "--output=all.json: needs a single checkpoint"),
        (["evaluate", "RUN", "--output", "RUN/evaluation.json"], "/evaluation.json: must not be a run's own file; cho"),
        (["evaluate", "RUN", "--output", "RUN/config.yaml"], "/config.yaml: must not be a run's own file; choose"),
        (["evaluate", "RUN", "--data", "RUN", "--data", "RUN"], "must be one directory, or token files"),
        (["evaluate", "RUN", "--dtype", "uint16"], "dtype=uint16: applies only to token files given as data"),
        (["evaluate", "RUN", "--tasks", "piqa", "--split", "heldout"], "--split: does not apply here; leave it out"),
        (["evaluate", "RUN", "--tasks", "piqa", "--unigram"], "--unigram: does not apply here; leave it out"),
        (["evaluate", "RUN", "--max-questions", "5"], "--max-questions: does not apply here; use it with --tasks"),
        (["evaluate", "RUN", "--tasks", "memory"], "task recall: no question fits in the 16 tokens"),
        (["evaluate", "RUN", "--tasks", "squad"], "tasks=squad: must be one of table3, memory, arc_challenge"),
        (["evaluate", "RUN", "--tasks", "piqa", "--split", "train"], "--split: does not apply here; leave it out with"),
        (["evaluate", "RUN", "--tasks", "piqa", "--no-unigram"], "--no-unigram: does not apply here"),
        (["generate", "RUN", "--temperature", "-1"], "temperature=-1.0"),
        (["generate", "RUN", "--prompt-file", "nothing"], "nothing cannot be read"),
        (["generate", "nothing"], "neither a run directory"),
    ],
)
def test_mistakes_end_in_one_line(
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    status = call(monkeypatch, *(argument.replace("RUN", str(run.path)) for argument in arguments))
    captured = capsys.readouterr()
    assert status == 1
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_evaluate_other_data(run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = run.path / "evaluation.json"
    assert call(monkeypatch, "evaluate", run.path) == 0
    own = file.read_text()
    other = shutil.copytree(run.data, run.data.with_name("other"))
    (other / "heldout" / "part-00001.npy").write_bytes(bytes(66))
    capsys.readouterr()
    note = f"not written: {file} is for the run's own held-out data; choose another file with --output\n"
    for options in (["--data", other], ["--split", "train"], ["--data", other / "heldout" / "part-00001.npy"]):
        assert call(monkeypatch, "evaluate", run.path, *options) == 0
        assert capsys.readouterr().out.endswith(note)
        assert file.read_text() == own
    (other / "tokenizer.json").write_text("{}")
    assert call(monkeypatch, "evaluate", run.path, "--data", other) == 1
    assert "other was made with another tokenizer than the data of" in capsys.readouterr().err
    assert file.read_text() == own


def test_evaluate_some_questions(run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = run.path / "tasks.json"
    results = [
        {"name": "piqa", "metric": "m", "value": 0.5, "standard_error": 0, "questions": 9, "chance": 0, "cut": 0}
    ]
    whole = json.dumps({"checkpoint": "step7", "context_length": 16, "max_questions": None, "results": results})
    file.write_text(whole)
    options = ["--tasks", "arc_easy", "--max-questions", 2]
    assert call(monkeypatch, "evaluate", run.path, *options) == 0
    note = f"not written: {file} has step7 on all questions; choose another file with --output\n"
    assert capsys.readouterr().out.endswith(note)
    assert file.read_text() == whole
    assert call(monkeypatch, "evaluate", run.path, *options, "--output", run.path / "some.json") == 0
    assert json.loads((run.path / "some.json").read_text())["max_questions"] == 2


def test_another_tokenizer_in_the_run(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = {"file": "tokenizer.json", "bytes": 3, "crc32": "00000000"}
    summary = {"eos_token_id": 0, "data": {"train": [], "heldout": [], "tokenizer": tokenizer}}
    (run.path / "summary.json").write_text(json.dumps(summary))
    for command in (["generate", run.path], ["evaluate", run.path, "--tasks", "piqa"], ["export", run.path, "out"]):
        assert call(monkeypatch, *command) == 1
        assert "run/tokenizer.json is not the one that the run began with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "file", "content", "message"),
    [
        (
            "evaluate",
            "run/config.yaml",
            "model: {}\nmodel: {}\n",
            ", line 2: not valid YAML: the key model is already in",
        ),
        (
            "evaluate",
            "run/config.yaml",
            "a: &a [1]\nb: [*a, *a]\n",
            ", line 1: not valid YAML: anchors (&) and aliases",
        ),
        (
            "evaluate",
            "tokens/manifest.json",
            '{"format_version": 1, "splits": "x"}',
            " is damaged (a list or an object is something",
        ),
        ("evaluate", "tokens/manifest.json", "[" * 10**5, " is damaged (it is nested too deeply); tokenize again"),
        (
            "generate",
            "run/tokenizer.json",
            '{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
            "vocabulary is empty",
        ),
        ("generate", "run/tokenizer_config.json", '{"eos_token": 5}', " is damaged (eos_token=5: must be text)"),
        ("report", "run/summary.json", "{}", " is damaged (system is missing; set it); write it again or remove it"),
        ("report", "run/evaluation.json", '{"tokens": 1e999}', " is damaged (checkpoint is missing; set it)"),
        ("report", "run/tasks.json", '{"checkpoint": "a", "checkpoint": "b"}', "damaged ('checkpoint' is in it twice)"),
        ("report", "run/samples.json", '[{"prompt": "a", "text": 5}]', " is damaged (entries.text=5: must be text"),
        ("report", "run/samples.json", '"\\ud800"', " is damaged ('utf-8' codec can't encode"),
    ],
)
def test_damaged_files_are_named(
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    file: str,
    content: str,
    message: str,
) -> None:
    summary = {"system": "dense", "parameters": dict.fromkeys(field_types(Parameters), 1)}
    (run.path / "summary.json").write_text(json.dumps({**summary, "flops_per_token": 1, "bytes_per_token": 1}))
    (run.path / "metrics.jsonl").write_text('{"step": 1, "metrics": {"train/CE loss": 3.0}}\n')
    (run.path.parent / file).write_text(content)
    assert call(monkeypatch, command, run.path) == 1
    *_, printed = capsys.readouterr().err.splitlines()
    assert printed.startswith("error: ")
    assert str(run.path.parent / file) in printed or "vocabulary" in printed
    assert message in printed


def test_a_tokenizer_that_makes_its_library_panic(
    run: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = run.path / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}))
    assert call(monkeypatch, "generate", run.path) == 1
    printed = capfd.readouterr().err
    assert printed.startswith(f"error: {file} cannot be read as a tokenizer.json (Precompiled: ")
    assert printed.endswith("; choose another tokenizer\n")
    assert printed.count("\n") == 1
