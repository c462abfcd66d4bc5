"""A small token directory, configurations of tiny runs on it, and runs in child processes that may die."""

import gzip
import json
import os
import socket
import traceback

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.planner import SavePlanner

from ultramem import MemoryConfig
from ultramem.data.token_files import Manifest, Split, TokenFile, save_manifest
from ultramem.hosts.olmo_core import ModelConfig, MoEConfig
from ultramem.training import DataConfig, RunConfig, TrainerConfig
from ultramem.training.reproducible import StepSeed

LENGTH, VOCABULARY, BATCH = 16, 100, 128
EPOCH_STEPS = 20  # and some sequences more, which do not make a batch
SYSTEMS = {
    "dense": {},
    "ultramem_v2": {
        "memory": MemoryConfig(
            num_keys=12, key_dim=8, value_dim=8, pre_value_dim=8, top_k=4, share_ratio=0.5, output_dropout=0.2
        )
    },
    "ultramem": {
        "num_blocks": 3,
        "memory": MemoryConfig(
            kind="ultramem",
            num_keys=12,
            key_dim=8,
            value_dim=8,
            top_k=4,
            heads=2,
            insertion="0:1/1:2",
            balance_coef=0.01,
        ),
    },
    "memory_plus": {
        "memory": MemoryConfig(
            kind="memory_plus", num_keys=12, key_dim=8, value_dim=32, top_k=4, optimizer="adamw", value_lr=1e-3
        )
    },
    "moe": {"feed_forward_size": 0, "moe": MoEConfig(hidden_size=16, num_experts=4, top_k=2)},
}


def _tokens(count, seed):
    """Text of a kind: mostly a fixed successor, sometimes any token; 0 ends a document."""
    random = np.random.default_rng(seed)
    successor = np.random.default_rng(7).permutation(VOCABULARY)
    tokens = [0]
    while len(tokens) < count:
        tokens.append(successor[tokens[-1]] if random.random() < 0.8 else random.integers(VOCABULARY))
    return np.array(tokens, dtype="<u2")


@pytest.fixture(scope="session")
def token_directory(tmp_path_factory):
    """A directory as `ultramem tokenize` writes it: 100 token ids, 3 bytes of text to a token."""
    directory = tmp_path_factory.mktemp("tokens")
    splits = {}
    for name, count in (("train", BATCH * EPOCH_STEPS + 3 * LENGTH + 5), ("heldout", 40 * LENGTH + 7)):
        path = directory / name / "part-00000.npy"
        path.parent.mkdir()
        _tokens(count, seed=len(name)).tofile(path)
        path.with_suffix(".csv.gz").write_bytes(gzip.compress(f"0,{count},a,b,1\n".encode()))
        splits[name] = Split(name, (TokenFile(path, 1, count, 3 * count),))
    (directory / "tokenizer.json").write_text("{}")
    save_manifest(Manifest(directory, splits, "uint16", VOCABULARY, 0, 0, "none", seed=0))
    return directory


@pytest.fixture
def token_files(tmp_path):
    """A configuration of two training files and a held-out one, named one by one."""
    for name, count in (("a", 100), ("b", 70), ("heldout", 50)):
        np.arange(count, dtype="<u4").tofile(tmp_path / f"{name}.npy")
    return DataConfig(
        train_files=(tmp_path / "a.npy", tmp_path / "b.npy"),
        heldout_files=(tmp_path / "heldout.npy",),
        sequence_length=16,
        vocab_size=100,
        eos_token_id=0,
        dtype="uint32",
    )


def tiny_config(data, directory, system="ultramem_v2", **options):
    """A run of 30 steps; options are as in `RunConfig`, or of its trainer section."""
    model = {"d_model": 32, "num_blocks": 2, "num_heads": 2, "feed_forward_size": 48, "vocab_size": 128}
    sections = {name: options.pop(name) for name in ("optimizer", "schedule", "logging") if name in options}
    trainer = {
        "steps": 30,
        "batch_size": BATCH,
        "checkpoint_interval": 10,
        "metrics_interval": 4,
        "memory_metrics_interval": 5,
        "evaluate_interval": 15,
        "evaluate_tokens": 20 * LENGTH,
    }
    return RunConfig(
        model=ModelConfig(**(model | SYSTEMS[system])),
        data=DataConfig(data, LENGTH),
        trainer=TrainerConfig(directory=directory, **(trainer | options)),
        **sections,
    )


@pytest.fixture
def make_config(token_directory, tmp_path):
    """Makes configurations of tiny runs; arguments as in `tiny_config`."""

    def make(system="ultramem_v2", directory="run", **options):
        return tiny_config(token_directory, tmp_path / directory, system, **options)

    return make


@pytest.fixture
def metrics_of():
    """Reads a run's metrics: those of each step, where the last line of a step counts."""

    def read(directory):
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        return {line["step"]: line["metrics"] for line in lines}

    return read


@pytest.fixture
def losses_of(metrics_of):
    """Reads a run's training losses by step."""
    return lambda directory: {step: metrics["train/CE loss"] for step, metrics in metrics_of(directory).items()}


def at_step(monkeypatch, step, action):
    """Do something at the beginning of a step."""
    original = StepSeed.pre_step

    def pre_step(self, batch):
        original(self, batch)
        if self.step == step:
            action()

    monkeypatch.setattr(StepSeed, "pre_step", pre_step)


@pytest.fixture
def in_children():
    """Runs a function in forked processes that find each other as those of torchrun do.

    Returns their exit statuses, negative for a signal.
    """

    def run(function, count):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        children = []
        for rank in range(count):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            children.append(_fork(function, {name: str(value) for name, value in environment.items()}))
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

    return run


@pytest.fixture
def in_child():
    """Runs a function in a forked process, which may be killed; returns the exit status, negative for a signal."""
    return lambda function: os.waitstatus_to_exitcode(os.waitpid(_fork(function, {}), 0)[1])


def _fork(function, environment):
    child = os.fork()
    if child != 0:
        return child
    status = 1
    try:
        os.environ.update(environment)
        for name, cache in vars(SavePlanner).items():
            if name.startswith("_cached"):
                cache.clear()  # plans of the parent's checkpoints, for another number of processes
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


@pytest.fixture(autouse=True)
def one_thread():
    """Results are the same to the bit, and forked processes may compute, only with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
