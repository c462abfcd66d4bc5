"""A tiny run directory and the token directory that it names, written without the code under test."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from olmo_core.distributed.checkpoint import save_model_and_optim_state
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ultramem.config import MemoryConfig
from ultramem.data.tokenizers import ChosenTokenizer
from ultramem.hosts.olmo_core import ModelConfig
from ultramem.hosts.olmo_core.model import MemoryTransformer

torch.set_num_threads(1)  # tensors this small are slower with more

CONFIG = """\
model:
  d_model: 32
  num_blocks: 2
  num_heads: 2
  feed_forward_size: 48
  vocab_size: 384
  memory: {num_keys: 8, key_dim: 8, value_dim: 8, pre_value_dim: 8, top_k: 4}
data:
  directory: DATA
  sequence_length: 16
trainer:
  directory: RUN
  batch_size: 64
  steps: 7
"""
MEMORY = MemoryConfig(num_keys=8, key_dim=8, value_dim=8, pre_value_dim=8, top_k=4)
MODEL = ModelConfig(d_model=32, num_blocks=2, num_heads=2, feed_forward_size=48, vocab_size=384, memory=MEMORY)
HELD_OUT_SIZES = (100, 33, 1)  # the last windows of 16 have 4 tokens, 1, and 1


@dataclass
class TinyRun:
    """A run directory whose checkpoint `step7` was made of `model`, and its data."""

    path: Path
    data: Path
    model: MemoryTransformer
    train: list[NDArray[np.uint16]]
    heldout: list[NDArray[np.uint16]]

    def save_checkpoint(self, step: int, model: MemoryTransformer | None = None) -> Path:
        """Write a complete checkpoint."""
        path = self.path / f"step{step}"
        save_model_and_optim_state(path / "model_and_optim", model or self.model)
        (path / "train").mkdir()
        torch.save({}, path / "train" / "rank0.pt")
        (path / ".metadata.json").write_text("{}")
        return path

    def change_config(self, old: str, new: str) -> None:
        """Replace a text in `config.yaml`."""
        config = self.path / "config.yaml"
        assert old in config.read_text()
        config.write_text(config.read_text().replace(old, new))


@pytest.fixture
def run(tmp_path: Path) -> TinyRun:
    """A run of one checkpoint."""
    return make_run(tmp_path)


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """The same for all tests of a file, which leave its files as they are."""
    return make_run(tmp_path_factory.mktemp("shared"))


def make_run(directory: Path) -> TinyRun:
    """Write a run of one checkpoint, and its data."""
    random = np.random.default_rng(0)
    train = [random.integers(0, 258, size, dtype=np.uint16) for size in (500, 200)]
    heldout = [random.integers(0, 258, size, dtype=np.uint16) for size in HELD_OUT_SIZES]
    data, path = directory / "tokens", directory / "run"
    write_data(data, {"train": train, "heldout": heldout}, sizes={"train": 2000, "heldout": 391})
    path.mkdir()
    (path / "config.yaml").write_text(CONFIG.replace("DATA", str(data)).replace("RUN", str(path)))
    (path / "tokenizer.json").write_text((data / "tokenizer.json").read_text())
    run = TinyRun(path, data, random_model(), train, heldout)
    run.save_checkpoint(7)
    return run


@pytest.fixture(scope="session")
def byte_tokenizer() -> ChosenTokenizer:
    """A token for each byte."""
    return ChosenTokenizer(byte_level_tokenizer(), "bytes", 0, 1)


@pytest.fixture(scope="session")
def untrained_model() -> MemoryTransformer:
    """As training begins with."""
    model = MODEL.build()
    model.init_weights(max_seq_len=16)
    return model.eval()


def random_model() -> MemoryTransformer:
    """A model that is sure of some tokens, depends on its context, and has other signs of u and t than an SVD gives."""
    model = MODEL.build()
    model.init_weights(max_seq_len=16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter *= 5 if name.startswith("embeddings") else 20
        for layer in model.memory.layers:
            layer.u.neg_()
            layer.t.neg_()
    return model.eval()


def write_data(directory: Path, splits: dict[str, list[NDArray[np.uint16]]], sizes: dict[str, int]) -> None:
    """A token directory as `ultramem tokenize` writes it; its tokenizer has a token for each byte.

    Args:
        directory: to make.
        splits: tokens of each file of each split.
        sizes: bytes of text of each split.
    """
    content = {}
    for split, arrays in splits.items():
        (directory / split).mkdir(parents=True)
        files = []
        for i, tokens in enumerate(arrays):
            name = f"{split}/part-{i:05d}.npy"
            tokens.astype("<u2").tofile(directory / name)
            (directory / name).with_suffix(".csv.gz").touch()
            files.append({"path": name, "documents": 1, "tokens": len(tokens), "bytes": sizes[split] if i == 0 else 0})
        content[split] = {"files": files}
    byte_level_tokenizer().save(str(directory / "tokenizer.json"))
    manifest = {
        "format_version": 1,
        "dtype": "uint16",
        "vocab_size": 258,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "tokenizer": "bytes",
        "seed": 0,
        "splits": content,
        "skipped": 0,
        "skipped_examples": [],
        "sources": {},
        "arguments": {},
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))


def byte_level_tokenizer() -> Tokenizer:
    """One token for each byte, after `<|endoftext|>` (0) and `<|padding|>` (1)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|padding|>"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(special + alphabet)}, []))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
