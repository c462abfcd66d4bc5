"""Finding and checking the token files of a run."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from ultramem.errors import ConfigError, UltraMemError
from ultramem.runs.config import DataConfig
from ultramem.runs.tokens import check_token_data, open_token_data


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
    with pytest.raises(ConfigError, match="more_directories: needs directory"):
        DataConfig(more_directories=(other,), train_files=(tmp_path / "a.npy",))


def test_files(token_files, make_config):
    data = open_token_data(token_files)
    assert (data.train, data.tokenizer, data.train_bytes_per_token) == (token_files.train_files, None, None)
    check_token_data(data, replace(make_config(), data=token_files))


def test_missing_file(token_files, make_config):
    token_files.train_files[1].unlink()
    with pytest.raises(UltraMemError, match=r"token file .*b.npy does not exist"):
        check_token_data(open_token_data(token_files), replace(make_config(), data=token_files))


def test_truncated_file(token_files, make_config):
    token_files.heldout_files[0].write_bytes(b"\0" * 41)
    with pytest.raises(UltraMemError, match=r"heldout.npy is truncated .*: 41 bytes found"):
        check_token_data(open_token_data(token_files), replace(make_config(), data=token_files))


def test_too_large_an_id(token_files, make_config):
    np.array([100] * 40, dtype="<u4").tofile(token_files.train_files[0])
    with pytest.raises(UltraMemError, match=r"a.npy has id 100 near token 0, but the vocabulary has 100 tokens"):
        check_token_data(open_token_data(token_files), replace(make_config(), data=token_files))


def test_vocabulary_larger_than_the_models(token_files, make_config):
    config = make_config()
    config = replace(config, data=token_files, model=replace(config.model, vocab_size=99))
    with pytest.raises(
        UltraMemError, match=r"model.vocab_size=99: must be at least 100, the vocabulary size of the data"
    ):
        check_token_data(open_token_data(token_files), config)


def test_fewer_tokens_than_a_batch(token_files, make_config):
    config = replace(make_config(batch_size=176), data=token_files)
    with pytest.raises(UltraMemError, match=r"batch_size=176: must be at most 160, .* in whole sequences of 16"):
        check_token_data(open_token_data(token_files), config)
