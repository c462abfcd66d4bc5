"""Stored checkpoints of a model's own configuration and of others."""

import errno
import json
import os
import pickle
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from olmo_core.distributed.checkpoint import save_model_and_optim_state, save_state_dict

from hostile_checkpoints import replace_item, sign
from ultramem import MemoryConfig, UltraMemError
from ultramem.files.checksums import DamagedFileError
from ultramem.hosts.olmo_core import ModelConfig, MoEConfig
from ultramem.hosts.olmo_core.checkpoint import (
    CheckpointFiles,
    CheckpointReader,
    check_stored_model,
    write_checksums,
)

SIZES: dict[str, Any] = {"d_model": 16, "num_blocks": 2, "num_heads": 2, "feed_forward_size": 24, "vocab_size": 32}
MEMORY = MemoryConfig(num_keys=6, key_dim=4, value_dim=16, top_k=4)
SYSTEMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "untied": {"tie_embeddings": False},
    "moe": {"moe": MoEConfig(hidden_size=8, num_experts=4, top_k=2)},
    "pkm": {"memory": replace(MEMORY, kind="pkm", query_per_rank=False)},
    "ultramem": {"memory": replace(MEMORY, kind="ultramem", insertion="0:1")},
    "ultramem_v2": {"memory": MEMORY},
}


def store(config: ModelConfig, directory: Path) -> Path:
    model = config.build()
    model.init_weights()
    save_model_and_optim_state(directory / "model_and_optim", model)
    return directory


@pytest.mark.parametrize("system", SYSTEMS)
def test_own_checkpoint(system: str, tmp_path: Path) -> None:
    config = ModelConfig(**SIZES, **SYSTEMS[system])
    check_stored_model(store(config, tmp_path / "checkpoint"), config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"it also has memory\.layers\.0\.cores"),
        ({"memory": replace(MEMORY, pre_value_dim=4)}, r"it lacks memory\.\S*pre_\S+"),
        (
            {"memory": replace(MEMORY, top_k=8, heads=2)},
            r"memory\.layers\.0\.\w+ has the shape \(1, .*\), not \(2, .*\)",
        ),
    ],
)
def test_checkpoint_of_another_model(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    directory = store(ModelConfig(**SIZES, memory=MEMORY), tmp_path / "checkpoint")
    other = ModelConfig(**SIZES, **options)
    with pytest.raises(
        UltraMemError,
        match=f"^{directory}/model_and_optim does not fit the run's configuration: {message}; restore the config",
    ):
        check_stored_model(directory, other)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DamagedFileError, match=r"checkpoint/model_and_optim/.metadata is missing"):
        check_stored_model(tmp_path / "checkpoint", ModelConfig(**SIZES))


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint with checksums, and its content: tensors, one of them empty and one a number, and values."""
    generator = torch.Generator().manual_seed(0)
    state = {f"tensor {i}": torch.randn(40, i, generator=generator) for i in range(20)}
    state |= {"number": torch.tensor(3), "value": 1.5, "text": "two"}
    (tmp_path / "train").mkdir()
    torch.save({"step": 3}, tmp_path / "train" / "rank0.pt")
    save_state_dict(tmp_path / "model_and_optim", state)
    write_checksums(tmp_path)
    return tmp_path, state


def read(checkpoint: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Everything that the checkpoint has of `state`."""
    empty = {name: torch.empty_like(x) if isinstance(x, torch.Tensor) else None for name, x in state.items()}
    CheckpointReader(checkpoint).load(empty)
    return empty


@pytest.mark.parametrize("with_checksums", [True, False])
def test_reads_what_was_written(with_checksums: bool, stored: tuple[Path, dict[str, Any]]) -> None:
    checkpoint, state = stored
    if not with_checksums:
        (checkpoint / "checksums.json").unlink()
    found = read(checkpoint, state)
    assert {name for name, x in state.items() if isinstance(x, torch.Tensor) and torch.equal(found[name], x)} == {
        name for name in state if name not in ("value", "text")
    }
    assert (found["value"], found["text"]) == (1.5, "two")
    assert CheckpointFiles.open(checkpoint).load("train/rank0.pt") == {"step": 3}


def test_every_item_has_a_checksum(stored: tuple[Path, dict[str, Any]]) -> None:
    checkpoint, state = stored
    checksums = json.loads((checkpoint / "checksums.json").read_text())["files"]
    files = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert checksums.keys() == files - {"checksums.json"}
    assert sum(len(pieces) for name, pieces in checksums.items() if name.endswith(".distcp")) == len(state)
    for name, pieces in checksums.items():
        content = (checkpoint / name).read_bytes()
        start = 0
        for length, crc in pieces:
            assert f"{zlib.crc32(content[start : start + length]):08x}" == crc
            start += length
        assert start == len(content)


def test_a_part_is_read_without_the_rest(stored: tuple[Path, dict[str, Any]]) -> None:
    """A flipped bit is found by those who read it."""
    checkpoint, state = stored
    place = next(
        place
        for index, place in CheckpointReader(checkpoint).read_metadata().storage_data.items()
        if index.fqn == "tensor 5"
    )
    path = checkpoint / "model_and_optim" / place.relative_path
    content = bytearray(path.read_bytes())
    content[place.offset + place.length // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=f"{place.relative_path} is damaged: it differs from its checksum"):
        read(checkpoint, state)
    others = {name: x for name, x in state.items() if name != "tensor 5"}
    assert read(checkpoint, others)["text"] == "two"


@pytest.mark.parametrize("name", ["model_and_optim/.metadata", "train/rank0.pt", "model_and_optim/__0_0.distcp"])
def test_a_file_without_a_checksum(name: str, stored: tuple[Path, dict[str, Any]]) -> None:
    checkpoint, state = stored
    content = json.loads((checkpoint / "checksums.json").read_text())
    del content["files"][name]
    (checkpoint / "checksums.json").write_text(json.dumps(content))
    with pytest.raises(DamagedFileError, match=f"{name} is damaged"):
        CheckpointFiles.open(checkpoint).load("train/rank0.pt") if "rank" in name else read(checkpoint, state)


@pytest.mark.parametrize("size", [0, 1000])
@pytest.mark.parametrize("with_checksums", [True, False])
def test_cut_files(size: int, with_checksums: bool, stored: tuple[Path, dict[str, Any]]) -> None:
    checkpoint, state = stored
    if not with_checksums:
        (checkpoint / "checksums.json").unlink()
    for path in (checkpoint / "model_and_optim").glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DamagedFileError, match=rf"distcp is damaged: it has {size} bytes, not \d+"):
        read(checkpoint, state)


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ({"relative_path": "../train/rank0.pt"}, r"it names a file elsewhere, '../train/rank0.pt'"),
        ({"relative_path": "/etc/passwd"}, r"it names a file elsewhere, '/etc/passwd'"),
        ({"relative_path": "below/file"}, r"it names a file elsewhere"),
        ({"relative_path": "a\0b"}, r"it names a file elsewhere"),
        ({"relative_path": ""}, r"is missing"),
        ({"relative_path": ".."}, r"is missing"),
        ({"relative_path": 3}, r"\.metadata is damaged"),
        ({"offset": -1}, r"-1 is no place in a file"),
        ({"length": -1}, r"-1 is no place in a file"),
        ({"length": 10.0}, r"10.0 is no place in a file"),
        ({"offset": 2**63}, r"is no place in a file"),
        ({"offset": 2**62}, r"is damaged: it has \d+ bytes, not"),
        ({"length": 2**62}, r"is damaged: it has \d+ bytes, not"),
        ({"offset": 10}, r"is damaged"),
        ({"length": 10}, r"is damaged"),
    ],
)
def test_places_outside_the_files(place: dict[str, Any], reason: str, stored: tuple[Path, dict[str, Any]]) -> None:
    checkpoint, state = stored
    (checkpoint / "checksums.json").unlink()
    path = checkpoint / "model_and_optim" / ".metadata"
    metadata = pickle.loads(path.read_bytes())  # written just above
    index = next(index for index in metadata.storage_data if index.fqn == "tensor 9")
    vars(metadata.storage_data[index]).update(place)
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(DamagedFileError, match=reason):
        read(checkpoint, state)


@pytest.mark.parametrize("other", [torch.zeros(40, 8), torch.zeros(1, 1), torch.zeros(()), [1.0], None])
def test_another_thing_in_a_tensors_place(other: Any, stored: tuple[Path, dict[str, Any]]) -> None:
    checkpoint, state = stored
    replace_item(checkpoint, "tensor 9", other)
    sign(checkpoint)
    with pytest.raises(DamagedFileError, match="is damaged"):
        read(checkpoint, state)


def test_not_readable(stored: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *arguments: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    files = CheckpointFiles.open(stored[0])
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UltraMemError, match=r"rank0.pt cannot be read \(Permission denied\)") as caught:
        files.load("train/rank0.pt")
    assert not isinstance(caught.value, DamagedFileError)


def test_a_pipe_is_not_waited_for(stored: tuple[Path, dict[str, Any]]) -> None:
    path = stored[0] / "train" / "rank0.pt"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DamagedFileError, match=r"rank0.pt is missing"):
        CheckpointFiles.open(stored[0]).load("train/rank0.pt")
