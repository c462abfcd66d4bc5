"""No command runs what a checkpoint holds; each ends in one clear line."""

import shutil

import pytest
import torch

from hostile_checkpoints import HOSTILE, ONLY_FOR_TRAINING, sign
from tiny_run import CONFIG, write_data
from ultramem.cli import main
from ultramem.training import load_config, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of eight steps at its second one, and its configuration."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("trained")
    tokens = {name: [torch.arange(400).remainder(258).numpy().astype("<u2")] for name in ("train", "heldout")}
    write_data(directory / "tokens", tokens, sizes={"train": 400, "heldout": 400})
    text = CONFIG.replace("DATA", str(directory / "tokens")).replace("RUN", str(directory / "run"))
    config = directory / "config.yaml"
    config.write_text(text.replace("steps: 7", "steps: 2"))
    train(load_config(config))
    config.write_text(text.replace("steps: 7", "steps: 8"))
    load_config(config).save(directory / "run" / "config.yaml")
    return directory


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the command; returns the exit status and what it wrote to standard error."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["ultramem", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, capsys.readouterr().err

    return run


@pytest.mark.parametrize("with_checksums", [True, False])
@pytest.mark.parametrize("kind", HOSTILE)
def test_nothing_is_run(kind, with_checksums, trained, call, tmp_path):
    run, marker = shutil.copytree(trained / "run", tmp_path / "run"), tmp_path / "marker"
    HOSTILE[kind](run / "step2", marker)
    if with_checksums:
        sign(run / "step2")
    else:
        (run / "step2" / "checksums.json").unlink()
    for command in (
        ("evaluate", run, "--no-unigram"),
        ("generate", run, "a", "--max-new-tokens", 1),
        ("export", run, tmp_path / "exported"),
        ("train", trained / "config.yaml", f"--trainer.directory={run}"),
    ):
        status, errors = call(*command)
        assert not marker.exists()
        if command[0] != "train" and kind in ONLY_FOR_TRAINING:
            assert status == 0
            continue
        assert status == 1
        assert errors.startswith(f"error: {run}/step2/")
        assert "is damaged" in errors
        assert "weights_only" not in errors
        assert errors.count("\n") == 1
