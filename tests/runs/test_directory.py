"""Whose a run directory is, and what a start removes from it."""

import json
from dataclasses import replace

import pytest
import torch

from ultramem.errors import UltraMemError
from ultramem.runs.config import LoggingConfig
from ultramem.runs.directory import RunDirectory
from ultramem.runs.tokens import open_token_data


@pytest.fixture
def run(make_config):
    """A run that has just been claimed."""
    directory = RunDirectory(make_config())
    directory.path.mkdir()
    assert directory.claim(overwrite=False) is None
    return directory


def checkpoint(run, step):
    for name in ("train/rank0.pt", "model_and_optim/.metadata", ".metadata.json"):
        path = run.checkpoint(step) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_finds_the_latest_and_removes_what_is_unfinished(run):
    for step in (5, 10, 20):
        checkpoint(run, step)
    (run.checkpoint(20) / ".metadata.json").unlink()
    (run.path / "step25-tmp" / "train").mkdir(parents=True)
    for name in ("step notes.txt", "step10.txt"):
        (run.path / name).touch()
    assert run.claim(overwrite=False) == 10
    assert sorted(path.name for path in run.path.glob("step*")) == ["step notes.txt", "step10", "step10.txt", "step5"]


def test_torn_line_is_cut(run):
    path = run.path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step"')
    run.claim(overwrite=False)
    assert path.read_text() == '{"step": 1}\n'
    path.write_text("{")
    run.claim(overwrite=False)
    assert path.read_text() == ""


def test_puts_aside_what_is_later(run):
    for step in (5, 10, 20):
        checkpoint(run, step)
    lines = ['{"step": 4}\n', "damaged\n", "[]\n", '{"step": 5}\n', '{"step": 6}\n', '{"step": 4}\n']
    (run.path / "metrics.jsonl").write_text("".join(lines))
    assert run.put_aside(20, "unused") == []
    assert run.put_aside(10, "damaged") == ["step20.damaged"]
    checkpoint(run, 20)
    assert run.put_aside(10, "damaged") == ["step20.damaged2"]
    assert (run.path / "metrics.jsonl").read_text() == "".join(lines)
    assert run.put_aside(5, "unused") == ["step10.unused", "metrics.jsonl.unused"]
    assert (run.path / "metrics.jsonl.unused").read_text() == "".join(lines)
    assert (run.path / "metrics.jsonl").read_text() == "".join(lines[:4] + lines[5:])
    assert (run.latest_step(), run.step_before(5), run.step_of("step5")) == (5, None, 5)


def test_what_may_change(run):
    trainer = replace(
        run.config.trainer, checkpoint_interval=7, async_checkpoints=True, precision="bfloat16", micro_batch_size=16
    )
    changed = replace(run.config, trainer=trainer, logging=LoggingConfig(tensorboard=True))
    assert RunDirectory(changed).claim(overwrite=False) is None
    assert "checkpoint_interval: 7" in (run.path / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("trainer", "steps", 31), ("trainer", "seed", 1), ("model", "d_model", 64), ("optimizer", "eps", 1e-7)],
)
def test_what_may_not(run, section, key, value):
    old = getattr(getattr(run.config, section), key)
    other = replace(run.config, **{section: replace(getattr(run.config, section), **{key: value})})
    written = (run.path / "config.yaml").read_text()
    with pytest.raises(
        UltraMemError, match=rf"holds another run \({section}.{key}={old} there, {value} here\); choose"
    ):
        RunDirectory(other).claim(overwrite=False)
    assert (run.path / "config.yaml").read_text() == written


def test_overwrite_removes_the_run_and_nothing_else(run, make_config):
    checkpoint(run, 5)
    for name in ("metrics.jsonl", "report.html", "notes.txt"):
        (run.path / name).touch()
    assert RunDirectory(make_config("dense")).claim(overwrite=True) is None
    assert sorted(path.name for path in run.path.iterdir()) == ["config.yaml", "notes.txt"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_without_a_configuration_are_nobodys(make_config, overwrite):
    directory = RunDirectory(make_config())
    checkpoint(directory, 5)
    with pytest.raises(UltraMemError, match=r"has step5 but no config.yaml, which would tell what run it is"):
        directory.claim(overwrite)
    assert directory.checkpoint(5).is_dir()


def test_unreadable_configuration(run):
    (run.path / "config.yaml").write_text("model: [")
    with pytest.raises(UltraMemError, match=r"configuration cannot be read \(.*line 1.*--overwrite"):
        run.claim(overwrite=False)


def test_only_one_process_at_a_time(run):
    second = RunDirectory(run.config)
    with run.locked(), pytest.raises(UltraMemError, match="another process is training in"), second.locked():
        pass
    with run.locked():
        pass


def test_directory_that_cannot_be_made(make_config, tmp_path):
    (tmp_path / "file").touch()
    run = RunDirectory(make_config(directory="file/run"))
    message = r"trainer.directory=.*file/run: cannot be created \(Not a directory\)"
    with pytest.raises(UltraMemError, match=message), run.locked():
        pass


def test_the_end_of_a_text_is_recorded(run):
    data = open_token_data(run.config.data)
    run.describe(data, torch.device("cpu"), 1)
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["eos_token_id"] == data.eos_token_id == 0
    # Of a run that version 0.1 began, what was known stays.
    del summary["eos_token_id"]
    old = summary | {"started": "long ago"}
    (run.path / "summary.json").write_text(json.dumps(old))
    run.describe(data, torch.device("cpu"), 1)
    assert json.loads((run.path / "summary.json").read_text()) == old | {"eos_token_id": 0}
    run.describe(replace(data, eos_token_id=3), torch.device("cpu"), 1)
    assert json.loads((run.path / "summary.json").read_text())["eos_token_id"] == 0
