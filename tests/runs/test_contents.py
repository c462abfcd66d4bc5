"""What a run's data is, and whether it is still the same."""

import json
import shutil
import zlib
from dataclasses import asdict, replace

import numpy as np
import pytest

from ultramem.data.token_files import load_manifest
from ultramem.errors import UltraMemError
from ultramem.runs.config import DataConfig
from ultramem.runs.contents import DataContents, FileContent, recorded_contents
from ultramem.runs.tokens import open_token_data


@pytest.fixture
def directory(token_directory, tmp_path):
    """A token directory of one's own, as version 0.1 wrote it."""
    return shutil.copytree(token_directory, tmp_path / "tokens")


def content(path):
    return FileContent(path.name, len(path.read_bytes()), f"{zlib.crc32(path.read_bytes()):08x}")


def contents(*, verify=True, **options):
    return DataContents.of(open_token_data(DataConfig(**options)), verify)


def test_of_a_directory(directory):
    train, heldout = (directory / split / "part-00000.npy" for split in ("train", "heldout"))
    expected = DataContents((content(train),), (content(heldout),), content(directory / "tokenizer.json"))
    assert contents(directory=directory) == expected
    unknown = contents(directory=directory, verify=False)
    assert [file.crc32 for file in (*unknown.train, *unknown.heldout)] == [None, None]
    load_manifest(directory).save_checksums()
    assert contents(directory=directory) == contents(directory=directory, verify=False) == expected


def test_of_several_directories_and_of_files(directory, tmp_path):
    other = shutil.copytree(directory, tmp_path / "other")
    load_manifest(other).save_checksums()
    found = contents(directory=directory, more_directories=(other,))
    assert found.train == (content(directory / "train" / "part-00000.npy"),) * 2
    assert len(found.heldout) == 1
    files = {"train_files": (directory / "train" / "part-00000.npy",), "dtype": "uint16"}
    found = contents(**files, vocab_size=100, eos_token_id=0)
    assert (found.train, found.heldout, found.tokenizer) == ((content(files["train_files"][0]),), (), None)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_damage_is_found_unless_verify_is_off(directory, split):
    load_manifest(directory).save_checksums()
    path = directory / split / "part-00000.npy"
    tokens = np.fromfile(path, dtype="<u2")
    tokens[5] ^= 1
    tokens.tofile(path)
    contents(directory=directory, verify=False)
    with pytest.raises(UltraMemError, match=rf"{split}/part-00000.npy is damaged: it differs from its checksum; copy"):
        contents(directory=directory)


def test_every_id_is_checked(directory):
    path = directory / "train" / "part-00000.npy"
    tokens = np.fromfile(path, dtype="<u2")
    tokens[-3] = 100
    tokens.tofile(path)
    with pytest.raises(UltraMemError, match="has id 100 near token 0, but the vocabulary has 100 tokens"):
        contents(directory=directory)


def test_the_same_elsewhere(directory, tmp_path):
    earlier = contents(directory=directory)
    directory.rename(tmp_path / "moved")
    data = open_token_data(DataConfig(tmp_path / "moved"))
    DataContents.of(data, verify=True).check_same(data, earlier)
    DataContents.of(data, verify=False).check_same(data, earlier)  # as far as it is known


def change_token(directory):
    path = directory / "train" / "part-00000.npy"
    np.fromfile(path, dtype="<u2")[::-1].tofile(path)


def shorten(directory):
    path = directory / "heldout" / "part-00000.npy"
    path.write_bytes(path.read_bytes()[:-2])
    manifest = directory / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"tokens": 647', '"tokens": 646'))


def change_tokenizer(directory):
    (directory / "tokenizer.json").write_text("[]")


@pytest.mark.parametrize(
    ("change", "name"),
    [(change_token, "train/part-00000.npy"), (shorten, "heldout/part-00000.npy"), (change_tokenizer, "tokenizer.json")],
)
def test_another_content(directory, change, name):
    earlier = contents(directory=directory)
    change(directory)
    data = open_token_data(DataConfig(directory))
    message = rf"{name} has changed since the run began; restore it, or start another run"
    with pytest.raises(UltraMemError, match=message):
        DataContents.of(data, verify=True).check_same(data, earlier)


def test_another_number_or_order(token_files):
    earlier = DataContents.of(open_token_data(token_files), verify=True)
    first, second = token_files.train_files
    reversed_data = open_token_data(replace(token_files, train_files=(second, first)))
    with pytest.raises(UltraMemError, match=r"b\.npy has changed since the run began"):
        DataContents.of(reversed_data, verify=True).check_same(reversed_data, earlier)
    fewer = open_token_data(replace(token_files, train_files=(first,)))
    with pytest.raises(UltraMemError, match="the run began with 2 train files and there are 1 now; restore them"):
        DataContents.of(fewer, verify=True).check_same(fewer, earlier)
    none = open_token_data(replace(token_files, heldout_files=()))
    with pytest.raises(UltraMemError, match="the run began with 1 heldout files and there are 0 now"):
        DataContents.of(none, verify=True).check_same(none, earlier)


def test_record(directory, tmp_path):
    assert recorded_contents(tmp_path) is None
    expected = contents(directory=directory)
    (tmp_path / "summary.json").write_text(json.dumps({"data": asdict(expected)}))
    assert recorded_contents(tmp_path) == expected
    (tmp_path / "summary.json").write_text("{}")
    assert recorded_contents(tmp_path) is None


@pytest.mark.parametrize(
    "record", [5, [], {}, {"train": 3}, {"train": [{}], "heldout": [], "tokenizer": None}, {"train": [], "heldout": []}]
)
def test_a_record_that_cannot_be_understood(record, tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"data": record}))
    with pytest.raises(UltraMemError, match=r"summary.json is damaged: data cannot be understood; restore it"):
        recorded_contents(tmp_path)
