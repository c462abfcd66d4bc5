"""`ultramem train` as a user sees it: output, one line for a mistake, and exit statuses."""

import os
import shutil
import signal
import sys

import numpy as np
import pytest

from ultramem.cli import main
from ultramem.data.token_files import load_manifest
from ultramem.training.reproducible import StepSeed


@pytest.fixture
def command(make_config, tmp_path, monkeypatch, capsys):
    """Runs the command on a configuration file; returns the exit status and both outputs."""
    make_config(steps=12).save(tmp_path / "config.yaml")

    def run(*arguments, config=tmp_path / "config.yaml"):
        monkeypatch.setattr(sys, "argv", ["ultramem", "train", str(config), *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, *capsys.readouterr()

    return run


def test_trains_once(command, tmp_path):
    status, output, _ = command("--trainer.metrics_interval=6", "--optimizer.learning_rate=1e-4")
    assert status == 0
    model = "ultramem_v2: 0.0 M active of 0.0 M parameters (embeddings included)"
    assert output.splitlines()[0].startswith(f"{model}; 12 steps of 128 tokens on")
    assert output.splitlines()[-1] == f"finished at step 12: {tmp_path / 'run'}"
    status, output, _ = command("--optimizer.learning_rate=1e-4")
    hint = "evaluate it with `ultramem evaluate`, or train again with --overwrite"
    assert (status, output) == (0, f"already finished at step 12: {tmp_path / 'run'}; {hint}\n")
    status, output, _ = command("--overwrite", "--trainer.steps=2")
    assert (status, output.splitlines()[-1]) == (0, f"finished at step 2: {tmp_path / 'run'}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_says_how_to_go_on(number, command, monkeypatch):
    original = StepSeed.pre_step

    def pre_step(self, batch):
        original(self, batch)
        if self.step == 3:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(StepSeed, "pre_step", pre_step)
        status, output, _ = command()
    assert status == 0
    assert "interrupted at step 3" in output
    assert output.splitlines()[-1].endswith("; run the same command again to resume")
    status, output, _ = command()
    assert status == 0
    assert "resuming from step 3" in output
    assert "finished at step 12" in output


def test_earlier_checkpoint(command, tmp_path):
    assert command("--trainer.checkpoint_interval=4")[0] == 0
    status, output, _ = command("--from-checkpoint", "step8", "--trainer.async_checkpoints=true")
    assert status == 0
    assert "resuming from step 8\nkept as step12.unused, metrics.jsonl.unused\n" in output
    assert output.splitlines()[-1] == f"finished at step 12: {tmp_path / 'run'}"
    status, _, errors = command("--from-checkpoint=step4")
    message = f"error: --from-checkpoint=step4: must be one of step8, step10, step12 in {tmp_path / 'run'}\n"
    assert (status, errors) == (1, message)
    assert command("--from-checkpoint=step8", "--overwrite")[2].startswith("error: --from-checkpoint=step8: does not")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer.stps=3"], "error: trainer.stps: unknown key; did you mean trainer.steps?"),
        (["--overwite"], "error: --overwite: is not an option"),
        (["--optimizer.betas=[1, 2, 3]"], "error: optimizer.betas=[1, 2, 3]: must be a list of 2 values"),
        (["--data.directory=/nowhere"], "error: /nowhere does not exist; write it with `ultramem tokenize"),
        (["--optimizer.learning_rate=1e30", "--optimizer.max_grad_norm=null"], "error: the "),
    ],
)
def test_a_mistake_is_one_line(command, arguments, message):
    status, _, errors = command(*arguments)
    assert status == 1
    assert errors.startswith(message)
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--model.num_blocks=1000000000", "model.num_blocks=1000000000: must be at least 1 and at most 4096"),
        ("--model.d_model=1000000", "model.d_model=1000000: must be lower, as at least 128,0"),
        ("--model.memory.num_keys=1000000", "model.memory.num_keys=1000000: must be lower, as at least 128,0"),
        ("--model.vocab_size=1000000000", "model.vocab_size=1000000000: must be lower, as at least 512 GB of memory"),
        ("--data.sequence_length=1000000000", "trainer.batch_size=128: must be a multiple of data.sequence_length"),
    ],
)
def test_sizes_that_cannot_be_allocated(option, named, command, tmp_path, monkeypatch):
    monkeypatch.setattr("ultramem.device.total_memory", lambda device: 24 * 10**9)
    status, _, errors = command(option)
    assert status == 1
    assert errors.startswith(f"error: {named}")
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_activations_that_cannot_be_allocated(command, tmp_path, monkeypatch):
    """Logits and residual stream of a batch of 128 tokens: 128 * (128 + 2 * 32) * 4 bytes."""
    for memory, ended in ((10**6, 0), (98303, 1)):
        monkeypatch.setattr("ultramem.device.total_memory", lambda device, memory=memory: memory)
        monkeypatch.setattr("ultramem.training.run.bytes_to_train", lambda *_: {"a": 0})
        status, _, errors = command("--trainer.steps=1", "--overwrite")
        assert status == ended
    assert errors.startswith("error: trainer.micro_batch_size=128: must be lower, as at least 0 MB of memory are")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "x"}, "RANK='x': must be a whole number in the environment"),
        ({"RANK": "0", "WORLD_SIZE": "-2"}, "WORLD_SIZE='-2': must be a whole number in the environment"),
        ({"RANK": "0"}, "RANK=0: must be from 0 to below WORLD_SIZE=None in the environment"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK: must be set in the environment"),
    ],
)
def test_wrong_environment(variables, message, command, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    status, _, errors = command()
    assert status == 1
    assert errors.startswith(f"error: {message}")
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_missing_configuration(command, tmp_path):
    status, _, errors = command(config=tmp_path / "none.yaml")
    assert status == 1
    assert errors == f"error: {tmp_path / 'none.yaml'}: cannot be read (No such file or directory); check the path\n"


@pytest.fixture
def tokens(token_directory, tmp_path):
    """A token directory of one's own, with checksums."""
    directory = shutil.copytree(token_directory, tmp_path / "tokens")
    load_manifest(directory).save_checksums()
    return directory


def change(path, *, checksums):
    """Another token at one place, as damage or, with other checksums, as other data of the same size."""
    tokens = np.fromfile(path, dtype="<u2")
    tokens[7] = (tokens[7] + 1) % 100
    tokens.tofile(path)
    if checksums:
        load_manifest(path.parents[1]).save_checksums()


@pytest.mark.parametrize("name", ["train/part-00000.npy", "heldout/part-00000.npy", "train/part-00000.csv.gz"])
def test_damaged_token_files(name, command, tokens, tmp_path):
    arguments = f"--data.directory={tokens}", "--trainer.steps=2"
    assert command(*arguments)[0] == 0
    kept = sorted((tmp_path / "run").iterdir())
    content = bytearray((tokens / name).read_bytes())
    content[-2] ^= 1
    (tokens / name).write_bytes(content)
    for more in (["--overwrite"], ["--overwrite", "--trainer.seed=3"]):
        status, _, errors = command(*arguments, *more)
        assert status == 1
        assert errors.startswith(f"error: {tokens / name} is damaged: it differs from its checksum; copy it again")
        assert len(errors.splitlines()) == 1
    assert sorted((tmp_path / "run").iterdir()) == kept
    assert command(*arguments)[1].startswith("already finished")
    assert "finished at step 2" in command(*arguments, "--overwrite", "--data.verify=false")[1]


def test_resumed_on_other_data(command, tokens, monkeypatch):
    """Of the same size; without checksums, as of version 0.1, too."""
    arguments = f"--data.directory={tokens}", "--trainer.evaluate_interval=null", "--trainer.steps=2"
    stop_at(monkeypatch, 1)
    assert "interrupted at step 1" in command(*arguments)[1]
    for checksums in (True, False):
        for split in ("train", "heldout"):
            file = tokens / split / "part-00000.npy"
            content = file.read_bytes()
            change(file, checksums=checksums)
            status, _, errors = command(*arguments)
            words = "has changed since the run began; restore it, or start another run"
            assert (status, errors) == (1, f"error: {file} {words}\n")
            file.write_bytes(content)
        load_manifest(tokens).save_checksums()
        if checksums:
            (tokens / "checksums.json").unlink()
    monkeypatch.undo()
    assert "finished at step 2" in command(*arguments, "--data.verify=false")[1]


def stop_at(monkeypatch, step):
    original = StepSeed.pre_step

    def pre_step(self, batch):
        original(self, batch)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(StepSeed, "pre_step", pre_step)
