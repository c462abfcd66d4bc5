"""Manifests and the checks of token files."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from ultramem.data.token_files import Manifest, Split, TokenFile, check_token_files, load_manifest, save_manifest
from ultramem.errors import ConfigError, UltraMemError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A finished directory of 10 training tokens and nothing held out."""
    root = tmp_path / "tokens"
    (root / "train").mkdir(parents=True)
    np.arange(10, dtype="<u2").tofile(root / "train" / "part-00000.npy")
    (root / "train" / "part-00000.csv.gz").write_bytes(b"")
    (root / "tokenizer.json").write_text("{}")
    train = Split("train", (TokenFile(root / "train" / "part-00000.npy", documents=2, tokens=10, bytes=33),))
    save_manifest(Manifest(root, {"train": train, "heldout": Split("heldout", ())}, "uint16", 300, 0, 1, "some", 5))
    return root


def test_manifest_round_trip(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory.parent)
    manifest = load_manifest("tokens")
    train = manifest.split("train")
    assert train.paths == [directory / "train" / "part-00000.npy"]
    assert (train.documents, train.tokens, train.bytes) == (2, 10, 33)
    assert (manifest.dtype, manifest.vocab_size, manifest.eos_token_id, manifest.pad_token_id) == ("uint16", 300, 0, 1)
    assert (manifest.tokenizer, manifest.seed) == ("some", 5)
    assert manifest.tokenizer_path == directory / "tokenizer.json"


def test_a_moved_directory_still_loads(directory: Path) -> None:
    moved = directory.rename(directory.with_name("moved"))
    assert load_manifest(moved).split("train").paths == [moved / "train" / "part-00000.npy"]


def test_empty_and_unknown_splits(directory: Path) -> None:
    manifest = load_manifest(directory)
    with pytest.raises(UltraMemError, match=r"'heldout' .* has no documents.*--heldout"):
        manifest.split("heldout")
    with pytest.raises(UltraMemError, match="choose one of train, heldout"):
        manifest.split("test")


@pytest.mark.parametrize("size", [19, 18, 22, 0])
def test_wrong_size_names_file_expected_and_found(directory: Path, size: int) -> None:
    file = directory / "train" / "part-00000.npy"
    file.write_bytes(bytes(size))
    with pytest.raises(UltraMemError, match=rf"part-00000.npy is damaged: {size} bytes found, 20 expected.*again"):
        load_manifest(directory)


@pytest.mark.parametrize("name", ["train/part-00000.npy", "train/part-00000.csv.gz", "tokenizer.json"])
def test_missing_file_is_named(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(UltraMemError, match=f"{name} is missing.*tokenize again"):
        load_manifest(directory)


def test_missing_directory_and_manifest(directory: Path) -> None:
    with pytest.raises(UltraMemError, match="nowhere does not exist"):
        load_manifest(directory / "nowhere")
    (directory / "manifest.json").unlink()
    with pytest.raises(UltraMemError, match=r"has no manifest.json.*did not finish"):
        load_manifest(directory)


@pytest.mark.parametrize("change", [{"format_version": 2}, {"dtype": "int64"}, {"splits": None}, {"splits": {"a": 1}}])
def test_damaged_manifest(directory: Path, change: dict[str, object]) -> None:
    path = directory / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | change))
    with pytest.raises(UltraMemError, match=r"manifest.json is damaged"):
        load_manifest(directory)
    path.write_text(path.read_text()[:50])
    with pytest.raises(UltraMemError, match=r"manifest.json is damaged"):
        load_manifest(directory)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_plain_token_files(tmp_path: Path, dtype: str) -> None:
    lengths = [1, 1000, 3 * 2**16 + 5]
    for length in lengths:
        (np.arange(length) % 500).astype(dtype).tofile(tmp_path / f"{length}.npy")
    assert check_token_files([tmp_path / f"{length}.npy" for length in lengths], dtype, 500) == lengths


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"abc", "3 bytes found, a multiple of 2 expected"),
        (np.array([1, 2, 500, 3], "<u2").tobytes(), "has id 500"),
        (np.r_[np.zeros(2**20), 777].astype("<u2").tobytes(), "has id 777"),
    ],
)
def test_bad_plain_token_files(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(UltraMemError, match=reason):
        check_token_files([tmp_path / "a.npy"], "uint16", 500)


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(UltraMemError, match=r"a.npy does not exist"):
        check_token_files([tmp_path / "a.npy"], "uint16", 500)
    with pytest.raises(UltraMemError, match="at least one"):
        check_token_files([], "uint16", 500)
    with pytest.raises(ConfigError, match="dtype='int8': must be uint16 or uint32"):
        check_token_files([tmp_path / "a.npy"], "int8", 500)


@pytest.fixture
def checked(directory: Path) -> Path:
    """The same with checksums, as `ultramem tokenize` writes it."""
    load_manifest(directory).save_checksums()
    return directory


def test_checksums_of_all_files(checked: Path) -> None:
    manifest = load_manifest(checked)
    (path,) = manifest.split("train").paths
    manifest.check([path, checked / "elsewhere.npy"])
    assert manifest.checksums()[path] == zlib.crc32(path.read_bytes())
    files = json.loads((checked / "checksums.json").read_text())["files"]
    assert files.keys() == {"manifest.json", "tokenizer.json", "train/part-00000.npy", "train/part-00000.csv.gz"}
    (checked / "checksums.json").unlink()
    assert manifest.checksums() == {}
    manifest.check([path])


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json", "checksums.json"])
def test_small_files_are_always_checked(checked: Path, name: str) -> None:
    text = (checked / name).read_text()
    (checked / name).write_text(text.replace('"', "'") if name == "checksums.json" else text + " ")
    remedy = "copy it again, or tokenize again with --overwrite; if it was changed on purpose, remove "
    with pytest.raises(UltraMemError, match=rf"{name} is damaged.*; {remedy}.*checksums\.json$"):
        load_manifest(checked)


@pytest.mark.parametrize("suffix", [".npy", ".csv.gz"])
def test_token_files_are_checked_when_asked(checked: Path, suffix: str) -> None:
    file = checked / "train" / f"part-00000{suffix}"
    file.write_bytes(bytes([*file.read_bytes()[:-1], 1]))
    manifest = load_manifest(checked)
    with pytest.raises(UltraMemError, match=rf"part-00000{suffix} is damaged: it differs from its checksum; copy it"):
        manifest.check(manifest.split("train").paths)


def test_every_id(tmp_path: Path) -> None:
    tokens = np.zeros(40 * 2**16, dtype="<u2")
    tokens[100_000] = 777  # between two samples
    tokens.tofile(tmp_path / "a.npy")
    assert check_token_files([tmp_path / "a.npy"], "uint16", 500) == [len(tokens)]
    with pytest.raises(UltraMemError, match="has id 777"):
        check_token_files([tmp_path / "a.npy"], "uint16", 500, every_id=True)
