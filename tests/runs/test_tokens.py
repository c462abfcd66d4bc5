"""Finding and checking token files, and dividing held-out windows between processes."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from ultramem.data.token_windows import TokenWindows
from ultramem.errors import ConfigError, UltraMemError
from ultramem.runs.tokens import (
    HeldoutBatches,
    HeldoutEvaluator,
    build_data_loader,
    check_token_data,
    open_token_data,
)
from ultramem.training import DataConfig


@pytest.fixture
def files(tmp_path):
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


def test_directory(token_directory):
    data = open_token_data(DataConfig(token_directory))
    assert data.train == (token_directory / "train" / "part-00000.npy",)
    assert (data.dtype, data.vocab_size, data.train_bytes_per_token) == ("uint16", 100, 3)
    assert data.tokenizer == token_directory / "tokenizer.json"


def test_more_directories(token_directory, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(token_directory, other)
    manifest = json.loads((other / "manifest.json").read_text())
    for part in manifest["splits"]["train"]["files"]:
        part["bytes"] *= 3
    (other / "manifest.json").write_text(json.dumps(manifest))
    alone, data = (open_token_data(DataConfig(token_directory, more_directories=more)) for more in ((), (other,)))
    assert data.train == (*alone.train, other / "train" / "part-00000.npy")
    assert data.heldout == alone.heldout
    assert data.train_bytes_per_token == 2 * alone.train_bytes_per_token
    (other / "tokenizer.json").write_text("[]")
    with pytest.raises(UltraMemError, match=r"data.more_directories: .*other has another tokenizer than .*--tokenizer"):
        open_token_data(DataConfig(token_directory, more_directories=(other,)))
    with pytest.raises(ConfigError, match="more_directories: go with directory"):
        DataConfig(more_directories=(other,), train_files=(tmp_path / "a.npy",))


def test_files(files, make_config):
    data = open_token_data(files)
    assert (data.train, data.tokenizer, data.train_bytes_per_token) == (files.train_files, None, None)
    check_token_data(data, replace(make_config(), data=files))


def test_each_sequence_comes_once_an_epoch(files, make_config):
    config = replace(make_config(batch_size=32), data=files)
    loader = build_data_loader(open_token_data(files), config, torch.device("cpu"), None)
    loader.reshuffle(epoch=1)
    first_tokens = [int(row[0]) for batch in loader for row in batch["input_ids"]]
    expected = [*range(0, 96, 16), *range(0, 64, 16)]  # of both files; the ends are left out
    assert sorted(first_tokens) == sorted(expected)
    assert first_tokens != expected


def test_missing_file(files, make_config):
    files.train_files[1].unlink()
    with pytest.raises(UltraMemError, match=r"token file .*b.npy does not exist"):
        check_token_data(open_token_data(files), replace(make_config(), data=files))


def test_truncated_file(files, make_config):
    files.heldout_files[0].write_bytes(b"\0" * 41)
    with pytest.raises(UltraMemError, match=r"heldout.npy is cut off .*: 41 bytes found"):
        check_token_data(open_token_data(files), replace(make_config(), data=files))


def test_too_large_an_id(files, make_config):
    np.array([100] * 40, dtype="<u4").tofile(files.train_files[0])
    with pytest.raises(UltraMemError, match=r"a.npy has id 100 near token 0, but the vocabulary has 100 tokens"):
        check_token_data(open_token_data(files), replace(make_config(), data=files))


def test_vocabulary_larger_than_the_models(files, make_config):
    config = make_config()
    config = replace(config, data=files, model=replace(config.model, vocab_size=99))
    with pytest.raises(UltraMemError, match=r"model.vocab_size=99: the data has 100 tokens in its vocabulary"):
        check_token_data(open_token_data(files), config)


def test_fewer_tokens_than_a_batch(files, make_config):
    config = replace(make_config(batch_size=176), data=files)
    with pytest.raises(UltraMemError, match=r"batch_size=176: .* only 160 tokens in whole sequences of 16"):
        check_token_data(open_token_data(files), config)


def batches_of(windows, batch_size, rank, processes):
    batches = HeldoutBatches(windows, batch_size, None)
    batches.rank, batches.processes = rank, processes
    return list(batches), len(batches)


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_processes_share_the_windows(files, processes):
    windows = TokenWindows(files.heldout_files, "uint32", 100, 16)  # 16, 16, 16 and 2 tokens
    tokens, counts = [], set()
    for rank in range(processes):
        batches, count = batches_of(windows, 3, rank, processes)
        counts |= {count, len(batches)}
        for batch in batches:
            tokens += batch["input_ids"][batch["label_mask"]].tolist()
    assert sorted(tokens) == list(range(50))
    assert len(counts) == 1


def test_metrics(files):
    windows = TokenWindows(files.heldout_files, "uint32", 100, 16)
    (first, second), _ = batches_of(windows, 3, 0, 1)
    evaluator = HeldoutEvaluator(HeldoutBatches(windows, 3, None), 2.5, torch.device("cpu"), None)
    losses = torch.zeros(3, 16)
    losses[:, :15] = 1.0  # of 45 tokens
    evaluator.update_metrics(first, losses, None)
    losses = torch.zeros(3, 16)
    losses[0, 0] = 24.0  # of the one that the last window predicts
    evaluator.update_metrics(second, losses, None)
    metrics = {name: float(value) for name, value in evaluator.compute_metrics().items()}
    mean = (45 + 24) / 46
    assert metrics == pytest.approx(
        {"CE loss": mean, "perplexity": np.exp(mean), "bits per byte": mean / np.log(2) / 2.5}
    )
