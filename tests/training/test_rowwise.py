"""Training with the row-wise optimizer: what it writes, how it resumes."""

from dataclasses import replace

import pytest
from tests.training.test_run import assert_same_model, kill

from tiny_training import at_step
from ultramem.training import train


def rowwise(config):
    memory = replace(config.model.memory, optimizer="rowwise", value_lr=5e-3)
    return replace(config, model=replace(config.model, memory=memory))


@pytest.mark.parametrize("micro_batch_size", [None, 32])
def test_killed_run_goes_on_exactly(micro_batch_size, make_config, losses_of, in_child, monkeypatch):
    whole, broken = (
        rowwise(make_config(directory=name, micro_batch_size=micro_batch_size)) for name in ("whole", "broken")
    )
    train(whole)
    with monkeypatch.context() as patch:
        at_step(patch, 17, kill)
        in_child(lambda: train(broken))
    train(broken)
    assert losses_of(broken.trainer.directory) == losses_of(whole.trainer.directory)
    assert_same_model(broken.trainer.directory, whole.trainer.directory)
