"""A run that is killed again and again ends as one that is not, to the bit. KILLS says how often (default 2)."""

import os
import random
import signal
import time

import torch

from tiny_training import _fork
from ultramem.hosts.olmo_core.checkpoint import CheckpointReader
from ultramem.training import train

KILLS = int(os.environ.get("KILLS", "2"))


def read_all(checkpoint):
    """All tensors of a checkpoint: model and optimizer."""
    reader = CheckpointReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if hasattr(entry, "size")
    }
    reader.load(dict(tensors))
    return tensors


def kill_while_training(config, delay):
    """Kill a process that trains, some seconds after it has written metrics; whether it was still there."""
    metrics = config.trainer.directory / "metrics.jsonl"
    before = metrics.stat().st_size if metrics.exists() else 0
    child = _fork(lambda: train(config), {})
    for _ in range(6000):
        if (metrics.exists() and metrics.stat().st_size > before) or os.waitpid(child, os.WNOHANG) != (0, 0):
            break
        time.sleep(0.01)
    time.sleep(delay)
    try:
        os.kill(child, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_curves_and_tensors_are_those_of_a_run_that_was_not_killed(make_config, metrics_of):
    steps = 40 * KILLS
    options = {"steps": steps, "checkpoint_interval": 5, "evaluate_interval": 5, "async_checkpoints": True}
    whole, broken = (make_config(directory=name, **options) for name in ("whole", "broken"))
    train(whole)
    seed = int(os.environ.get("TEST_SEED", random.SystemRandom().randrange(2**32)))
    print(f"seed {seed}: repeat with TEST_SEED={seed}")
    delays = random.Random(seed)
    killed = sum(kill_while_training(broken, delays.uniform(0, 0.4)) for _ in range(KILLS))
    assert train(broken).status in ("finished", "already finished")
    print(f"killed {killed} times")
    assert killed > KILLS // 2
    expected, found = (
        {
            step: {name: value for name, value in metrics.items() if not name.startswith("throughput")}
            for step, metrics in metrics_of(config.trainer.directory).items()
        }
        for config in (whole, broken)
    )
    assert found == expected
    tensors, others = (read_all(config.trainer.directory / f"step{steps}") for config in (whole, broken))
    assert tensors.keys() == others.keys()
    assert len(tensors) > 50
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
