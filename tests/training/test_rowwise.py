"""Training with the row-wise optimizer: what it writes, how it resumes; tables in float32 and in bfloat16."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from tests.training.test_run import assert_same_model, kill
from torch.distributed.checkpoint import FileSystemReader

from tiny_training import at_step
from ultramem.errors import ConfigError
from ultramem.evaluation import load_model
from ultramem.hosts.olmo_core.model import MemoryTransformer
from ultramem.training import load_config, train
from ultramem.training.processes import join_processes

NARROW = {"table_dtype": "bfloat16"}


def rowwise(config, **fields):
    memory = replace(config.model.memory, optimizer="rowwise", value_lr=5e-3, **fields)
    return replace(config, model=replace(config.model, memory=memory))


def stored_dtypes(directory):
    """Dtypes in the last checkpoint, of the tables' parameters and of all else."""
    metadata = FileSystemReader(directory / "step30" / "model_and_optim").read_metadata().state_dict_metadata
    dtypes = {True: set(), False: set()}
    for name, entry in metadata.items():
        if hasattr(entry, "properties") and "shuffle" not in name:
            dtypes[name.startswith("model.memory.") and "values" in name].add(entry.properties.dtype)
    return dtypes[True], dtypes[False]


@pytest.mark.parametrize("fields", [{}, NARROW], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("micro_batch_size", [None, 32])
def test_killed_run_goes_on_exactly(micro_batch_size, fields, make_config, losses_of, in_child, monkeypatch):
    whole, broken = (
        rowwise(make_config(directory=name, micro_batch_size=micro_batch_size), **fields)
        for name in ("whole", "broken")
    )
    assert in_child(lambda: train(whole)) == 0  # PyTorch keeps the metadata of an earlier run's checkpoint
    with monkeypatch.context() as patch:
        at_step(patch, 17, kill)
        in_child(lambda: train(broken))
    train(broken)
    assert losses_of(broken.trainer.directory) == losses_of(whole.trainer.directory)
    assert_same_model(broken.trainer.directory, whole.trainer.directory)
    tables = {torch.bfloat16} if fields else {torch.float32}
    assert stored_dtypes(whole.trainer.directory) == (tables, {torch.float32})


@pytest.mark.parametrize("system", ["ultramem_v2", "memory_plus"])
def test_narrow_tables_learn_as_wide_ones(system, make_config, losses_of, metrics_of):
    """On a CPU in float32, where all but the rounding of the tables is the same."""
    wide, narrow = (
        rowwise(make_config(system, directory=name, precision="float32"), **fields)
        for name, fields in (("wide", {}), ("narrow", NARROW))
    )
    for config in (wide, narrow):
        train(config)
    assert load_config(narrow.trainer.directory / "config.yaml") == narrow
    expected, found = (losses_of(config.trainer.directory) for config in (wide, narrow))
    assert found != expected
    assert found == pytest.approx(expected, abs=0.05)
    last, wanted = (metrics_of(config.trainer.directory)[30] for config in (narrow, wide))
    assert last["eval/heldout/CE loss"] == pytest.approx(wanted["eval/heldout/CE loss"], abs=0.05)
    assert last["optim/table grad norm"] == pytest.approx(wanted["optim/table grad norm"], rel=0.1)
    model, _ = load_model(narrow.trainer.directory, "cpu")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if "values" in name else torch.float32)


def test_narrow_replicas_stay_equal(make_config, in_children, losses_of):
    """Each of two processes rounds its own copy of the tables."""
    single, double = (
        rowwise(make_config(directory=name, **options), output_dropout=0.0, **NARROW)
        for name, options in (("single", {"micro_batch_size": 64}), ("double", {"parallel": "ddp"}))
    )
    train(single)

    def train_and_compare():
        original = MemoryTransformer.post_optim_step

        def post_optim_step(self):
            original(self)
            tables = [parameter.detach().float() for parameter in self.memory.table.parameters()]
            for table in tables:
                first = table.clone()
                dist.broadcast(first, 0)
                assert torch.equal(table, first)

        MemoryTransformer.post_optim_step = post_optim_step
        train(double)

    assert in_children(train_and_compare, 2) == [0, 0]
    assert losses_of(double.trainer.directory) == pytest.approx(losses_of(single.trainer.directory), abs=0.05)


@pytest.mark.parametrize("parallel", ["fsdp", "auto"])
def test_narrow_tables_are_not_sharded(parallel, make_config, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = rf"trainer.parallel={parallel}: .*model.memory.table_dtype=bfloat16.*; set trainer.parallel=ddp, or"
    with pytest.raises(ConfigError, match=message), join_processes(rowwise(make_config(parallel=parallel), **NARROW)):
        pass
