"""Checkpoints of runs: damage is noticed, an earlier one can be chosen, and writing may go on beside training."""

import errno
import json
import os
import random
import re
import shutil
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from olmo_core.distributed.checkpoint.filesystem import RemoteFileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tiny_training import at_step, tiny_config
from ultramem.errors import ConfigError, UltraMemError
from ultramem.files.checksums import Checksums, DamagedFileError
from ultramem.hosts.olmo_core.checkpoint import CheckpointReader
from ultramem.training import train
from ultramem.training.checkpointer import Checkpointer, read_trainer_state

FLIPS = int(os.environ.get("BIT_FLIPS", 100))


class StoppedError(Exception):
    """A run that ends like that writes no checkpoint."""


def stop():
    raise StoppedError


@pytest.fixture(scope="module")
def runs(token_directory, tmp_path_factory):
    """A run of 16 steps, `whole`, and the same run when it had stopped at step 13, with three checkpoints: `part`."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("runs")
    options = {"steps": 16, "checkpoint_interval": 4, "keep_checkpoints": None, "evaluate_interval": None}
    train(tiny_config(token_directory, directory / "whole", **options))
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 14, stop)
        with pytest.raises(StoppedError):
            train(tiny_config(token_directory, directory / "part", **options))
    return directory


@pytest.fixture
def config(runs, token_directory, tmp_path):
    """The configuration of a copy of the part."""
    shutil.copytree(runs / "part", tmp_path / "run")
    options = {"steps": 16, "checkpoint_interval": 4, "keep_checkpoints": None, "evaluate_interval": None}
    return tiny_config(token_directory, tmp_path / "run", **options)


def names(directory):
    return sorted(path.name for path in directory.iterdir() if path.name.startswith(("step", "metrics")))


def contents(directory):
    """Of all files but the configuration, which is written at each start."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != "config.yaml")
    return {path.relative_to(directory): path.read_bytes() for path in files}


def same(one, other):
    """Whether two values are equal, to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other


def largest(checkpoint):
    return max((checkpoint / "model_and_optim").glob("*.distcp"), key=lambda path: path.stat().st_size)


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


DAMAGE = {
    "shard": lambda checkpoint: flip(largest(checkpoint), 4 * largest(checkpoint).stat().st_size),
    "cut shard": lambda checkpoint: os.truncate(largest(checkpoint), 5000),
    "missing shard": lambda checkpoint: largest(checkpoint).unlink(),
    "metadata": lambda checkpoint: flip(checkpoint / "model_and_optim" / ".metadata", 5000),
    "state": lambda checkpoint: flip(checkpoint / "train" / "rank0.pt", 5000),
    "checksums": lambda checkpoint: os.truncate(checkpoint / "checksums.json", 100),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_one_before_a_damaged_checkpoint_is_used(damage, config, runs, losses_of, capsys):
    directory = config.trainer.directory
    DAMAGE[damage](directory / "step12")
    damaged = contents(directory / "step12")
    assert train(config).status == "finished"
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if re.match(r"step12 is damaged \(.*step12/.*\); resuming from step8$", line)]
    assert "kept as step12.damaged" in lines
    assert names(directory) == ["metrics.jsonl", "step12", "step12.damaged", "step16", "step4", "step8"]
    assert contents(directory / "step12.damaged") == damaged
    assert losses_of(directory) == losses_of(runs / "whole")
    for step in ("step12", "step16"):
        assert same_state(directory / step, runs / "whole" / step)


def test_all_damaged(config):
    directory = config.trainer.directory
    for step in (4, 8, 12):
        DAMAGE["shard"](directory / f"step{step}")
    before = contents(directory)
    with pytest.raises(UltraMemError, match=r"step4/.* is damaged: .*; there is no earlier checkpoint, .*--overwrite"):
        train(config)
    assert contents(directory) == before


def test_damaged_for_one_of_two_processes(make_config, in_children, monkeypatch, losses_of):
    config = make_config(steps=12, checkpoint_interval=4, evaluate_interval=None, parallel="ddp")
    with monkeypatch.context() as patch:
        at_step(patch, 10, lambda: os.kill(os.getpid(), signal.SIGKILL))
        assert in_children(lambda: train(config), 2) == [-signal.SIGKILL] * 2
    directory = config.trainer.directory
    flip(directory / "step8" / "train" / "rank1.pt", 4000)
    assert in_children(lambda: train(config), 2) == [0, 0]
    assert names(directory) == ["metrics.jsonl", "step12", "step4", "step8", "step8.damaged"]
    assert sorted(losses_of(directory)) == list(range(1, 13))


def test_a_damaged_name_is_not_taken_twice(config):
    directory = config.trainer.directory
    shutil.copytree(directory / "step8", directory / "step12.damaged")
    DAMAGE["shard"](directory / "step12")
    train(config)
    assert {"step12.damaged", "step12.damaged2"} <= set(names(directory))


def test_earlier_checkpoint(config, runs, losses_of, capsys):
    directory = config.trainer.directory
    before = (directory / "metrics.jsonl").read_text()
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 7, stop)
        with pytest.raises(StoppedError):
            train(config, from_checkpoint="step4")
    output = capsys.readouterr().out
    assert "resuming from step 4\nkept as step8.unused, step12.unused, metrics.jsonl.unused\n" in output
    assert (directory / "metrics.jsonl.unused").read_text() == before
    assert max(losses_of(directory)) < 7
    assert train(config).status == "finished"
    assert names(directory) == [
        *("metrics.jsonl", "metrics.jsonl.unused", "step12", "step12.unused", "step16"),
        *("step4", "step8", "step8.unused"),
    ]
    assert losses_of(directory) == losses_of(runs / "whole")
    assert same_state(directory / "step16", runs / "whole" / "step16")


def test_earlier_checkpoint_of_a_finished_run(runs, token_directory, tmp_path):
    options = {"steps": 16, "checkpoint_interval": 4, "keep_checkpoints": None, "evaluate_interval": None}
    config = tiny_config(token_directory, shutil.copytree(runs / "whole", tmp_path / "run"), **options)
    assert train(config, from_checkpoint="step16").status == "already finished"
    assert train(config, from_checkpoint="step12").status == "finished"
    assert "step16.unused" in names(config.trainer.directory)


@pytest.mark.parametrize("name", ["step5", "step4-tmp", "4", "", "../run/step4", "step14"])
def test_no_such_checkpoint(name, config):
    directory = config.trainer.directory
    (directory / "step14").mkdir()
    before = contents(directory)
    with pytest.raises(UltraMemError, match=rf"^--from-checkpoint={name}: must be one of step4, step8, step12 in /"):
        train(config, from_checkpoint=name)
    assert contents(directory) == before


def test_from_a_checkpoint_of_no_run(make_config):
    with pytest.raises(UltraMemError, match=r"--from-checkpoint=step4: must be left out, as there is no complete ch"):
        train(make_config(), from_checkpoint="step4")
    with pytest.raises(ConfigError, match=r"--from-checkpoint=step4: does not apply with --overwrite"):
        train(make_config(), from_checkpoint="step4", overwrite=True)


def test_a_chosen_checkpoint_is_damaged(config):
    DAMAGE["metadata"](config.trainer.directory / "step8")
    before = contents(config.trainer.directory)
    with pytest.raises(UltraMemError, match=r"step8/\S+ is damaged: .*; use an earlier one: --from-checkpoint step4$"):
        train(config, from_checkpoint="step8")
    assert contents(config.trainer.directory) == before


def state_of(checkpoint):
    """All tensors, all other values, and the trainer's state."""
    reader = CheckpointReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.zeros(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for name, entry in stored.items()
    }
    reader.load(state)
    trainer = read_trainer_state(checkpoint)
    return state, trainer


def same_state(one, other):
    """Whether two checkpoints are equal but for the random state, which differs with what was done before."""
    states = [state_of(checkpoint) for checkpoint in (one, other)]
    for _, trainer in states:
        del trainer["rng"]
    return same(*states)


def test_bit_flips(make_config):
    """In any file; each is noticed, or changes nothing that is loaded."""
    config = make_config("dense", steps=1, evaluate_interval=None)
    train(replace(config, model=replace(config.model, num_blocks=1)))
    checkpoint = config.trainer.directory / "step1"
    expected = state_of(checkpoint)
    files, generator = sorted(path for path in checkpoint.rglob("*") if path.is_file()), random.Random(0)
    counts = {path.relative_to(checkpoint).as_posix(): [0, 0] for path in files}
    for _ in range(FLIPS):
        path = generator.choice(files)
        bit = generator.randrange(8 * path.stat().st_size)
        flip(path, bit)
        try:
            assert same(state_of(checkpoint), expected), f"bit {bit} of {path}"
            noticed = False
        except DamagedFileError:
            noticed = True
        counts[path.relative_to(checkpoint).as_posix()][not noticed] += 1
        flip(path, bit)
    print("noticed, harmless:", json.dumps(counts, indent=1))
    harmless = {name for name, (_, count) in counts.items() if count > 0}
    assert harmless <= {".metadata.json", "checksums.json"}


def test_asynchronous_checkpoints_are_the_same(config, runs, monkeypatch, losses_of):
    """Although they are written when training is some steps further."""
    directory = config.trainer.directory
    config = replace(config, trainer=replace(config.trainer, async_checkpoints=True))
    write, waits, further = RemoteFileSystemWriter.write_data, threading.Event(), []

    def late(self, plan, planner):
        further.append(waits.wait(30))
        return write(self, plan, planner)

    monkeypatch.setattr(RemoteFileSystemWriter, "write_data", late)
    at_step(monkeypatch, 11, waits.set)
    assert train(config, from_checkpoint="step4").status == "finished"
    assert further == [True] * 3
    assert losses_of(directory) == losses_of(runs / "whole")
    for step in ("step8", "step12", "step16"):
        assert same_state(directory / step, runs / "whole" / step)
        checksums = Checksums.load(directory / step)
        checksums.check()
        assert checksums.files.keys() == Checksums.load(runs / "whole" / step).files.keys()


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("owner", "name", "asynchronous"),
    [
        (RemoteFileSystemWriter, "write_data", True),
        (Checkpointer, "_save_train_state", True),
        (Checksums, "save", True),
        (Checksums, "save", False),
        (Checkpointer, "write_file", True),
    ],
)
def test_full_disk(owner, name, asynchronous, config, monkeypatch, caplog):
    config = replace(config, trainer=replace(config.trainer, async_checkpoints=asynchronous))
    at_step(monkeypatch, 7, lambda: monkeypatch.setattr(owner, name, full))
    message = (
        r"^the checkpoint of step 8 cannot be written to \S+step8 \(No space left on device\); free some space and"
    )
    with pytest.raises(UltraMemError, match=rf"{message} .*; the last good checkpoint is \S+step4$"):
        train(config, from_checkpoint="step4")
    assert names(config.trainer.directory)[-3:] == ["step12.unused", "step4", "step8.unused"]
    assert not [record for record in caplog.records if "exception calling callback" in record.message]


def test_killed_while_writing_beside_training(config, in_child, monkeypatch, losses_of, runs):
    config = replace(config, trainer=replace(config.trainer, async_checkpoints=True))
    directory = config.trainer.directory
    started = threading.Event()

    def endless(self, metadata, results):
        started.set()
        time.sleep(60)

    def kill():
        started.wait(30)
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(RemoteFileSystemWriter, "finish", endless)
        at_step(patch, 10, kill)
        assert in_child(lambda: train(config, from_checkpoint="step4")) == -signal.SIGKILL
    assert (directory / "step8" / "train" / "rank0.pt").is_file()
    assert not (directory / "step8" / "model_and_optim" / ".metadata").exists()
    assert train(config).status == "finished"
    assert losses_of(directory) == losses_of(runs / "whole")


def test_an_error_lets_a_checkpoint_be_finished(config, monkeypatch):
    config = replace(config, trainer=replace(config.trainer, async_checkpoints=True))
    save = Checksums.save

    def slow(self):
        time.sleep(0.5)
        save(self)

    def fail():
        raise UltraMemError("a mistake")

    monkeypatch.setattr(Checksums, "save", slow)
    at_step(monkeypatch, 9, fail)
    with pytest.raises(UltraMemError, match=r"^a mistake; the last good checkpoint is \S+step8$"):
        train(config, from_checkpoint="step4")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_asynchronous_checkpoints_of_two_processes(parallel, make_config, in_children, losses_of):
    options = {"steps": 5, "checkpoint_interval": 2, "keep_checkpoints": 1, "evaluate_interval": None}
    options["parallel"] = parallel
    plain = make_config(directory="plain", **options)
    beside = make_config(directory="beside", async_checkpoints=True, **options)
    for config in (plain, beside):
        assert in_children(lambda config=config: train(config), 2) == [0, 0]
        assert names(config.trainer.directory) == ["metrics.jsonl", "step4", "step5"]
    assert losses_of(plain.trainer.directory) == losses_of(beside.trainer.directory)
    for step in ("step4", "step5"):
        assert same_state(plain.trainer.directory / step, beside.trainer.directory / step)
        Checksums.load(beside.trainer.directory / step).check()
    assert {"train/rank0.pt", "train/rank1.pt"} <= Checksums.load(beside.trainer.directory / "step4").files.keys()
