"""Several processes against one, and what is said where they do not fit the configuration."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from ultramem.errors import ConfigError
from ultramem.training import train
from ultramem.training.processes import join_processes
from ultramem.training.reproducible import StepSeed

SYSTEMS = ("ultramem_v2", "ultramem", "moe")


@pytest.fixture
def make(make_config):
    """Makes configurations whose result does not depend on the number of processes.

    That is without dropout, and without losses that balance keys or experts, which are not sums over tokens.
    """

    def make(system, directory, **options):
        config = make_config(system, directory, **({"steps": 20} | options))
        memory, moe = config.model.memory, config.model.moe
        if memory is not None:
            penalty = 0.1 if system == "ultramem" else 0.0
            memory = replace(memory, output_dropout=0.0, balance_coef=0.0, tucker_penalty_coef=penalty)
        if moe is not None:
            moe = replace(moe, load_balancing_coef=0.0)
        return replace(config, model=replace(config.model, memory=memory, moe=moe))

    return make


@pytest.mark.parametrize("system", SYSTEMS)
def test_two_processes_learn_as_one(system, make, in_children, losses_of, metrics_of):
    single = make(system, "single", micro_batch_size=64)
    train(single)
    expected = losses_of(single.trainer.directory)
    for parallel in ("fsdp", "ddp"):
        config = make(system, parallel, parallel=parallel, micro_batch_size=32)
        assert in_children(lambda config=config: train(config), 2) == [0, 0]
        assert losses_of(config.trainer.directory) == pytest.approx(expected, abs=1e-4)
        last, wanted = (metrics_of(run.trainer.directory)[20] for run in (config, single))
        assert last["optim/total grad norm"] == pytest.approx(wanted["optim/total grad norm"], rel=1e-3)
        assert last["eval/heldout/CE loss"] == pytest.approx(wanted["eval/heldout/CE loss"], abs=1e-4)
        for name in wanted:
            if name.startswith("memory/"):
                assert last[name] == pytest.approx(wanted[name], rel=0.05, abs=1e-3), name


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on(before, after, make, in_children, losses_of, monkeypatch):
    whole, config = make("ultramem_v2", "whole"), make("ultramem_v2", "broken")
    train(whole)
    original = StepSeed.pre_step

    def pre_step(self, batch):
        original(self, batch)
        if self.step == 12:
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(StepSeed, "pre_step", pre_step)
        assert in_children(lambda: train(config), before) == [-signal.SIGKILL] * before
    assert in_children(lambda: train(config), after) == [0] * after
    assert losses_of(config.trainer.directory) == pytest.approx(losses_of(whole.trainer.directory), abs=1e-4)


def test_interrupt_of_one_process_stops_all(make, in_children, monkeypatch, losses_of):
    config = make("ultramem_v2", "run", parallel="ddp")
    original = StepSeed.pre_step

    def pre_step(self, batch):
        original(self, batch)
        if self.step == 6 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(StepSeed, "pre_step", pre_step)
    assert in_children(lambda: train(config), 2) == [0, 0]
    assert max(losses_of(config.trainer.directory)) == 6
    assert (config.trainer.directory / "step6" / ".metadata.json").is_file()


def test_torchrun_and_the_command(make, tmp_path, losses_of):
    config = make("ultramem", "run", steps=4)
    config.save(tmp_path / "config.yaml")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command = [*launcher, "-m", "ultramem.cli", "train", str(tmp_path / "config.yaml"), "--trainer.metrics_interval=2"]
    result = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=200, check=True
    )
    assert result.stdout.count("finished at step 4") == 1
    assert "2 processes" in result.stdout
    assert "Traceback" not in result.stderr
    assert list(losses_of(config.trainer.directory)) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("options", "processes", "message"),
    [
        ({"parallel": "fsdp"}, 1, "trainer.parallel=fsdp: needs torchrun; start with it, or use auto"),
        ({"parallel": "none"}, 2, "trainer.parallel=none: needs a single process, but there are 2; use fsdp or ddp"),
        (
            {},
            3,
            "trainer.batch_size=128: must be a multiple of data.sequence_length=16 times the 3 processes, such as 144",
        ),
        (
            {"micro_batch_size": 48},
            2,
            "trainer.micro_batch_size=48: must divide each process's share of the batch, 64 tok",
        ),
        ({"compile": True, "device": "cpu"}, 1, "trainer.compile=True: needs a CUDA device; leave it out"),
        ({"device": "cuda"}, 1, "trainer.device=cuda: PyTorch finds no CUDA device here; use cpu"),
    ],
)
def test_what_does_not_fit(options, processes, message, make_config, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if processes > 1:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(ConfigError) as caught, join_processes(make_config(**options)):
        pass
    assert str(caught.value).startswith(message)
