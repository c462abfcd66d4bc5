"""Metadata of checkpoints are read as data, and nothing that they name is run or changed."""

from __future__ import annotations

import collections
import contextlib
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dist_cp
from olmo_core.distributed.checkpoint import save_state_dict
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties

from hostile_checkpoints import PICKLES, Call
from ultramem.hosts.olmo_core.stored_metadata import parse_metadata

STATE: dict[str, Any] = {
    "a": torch.zeros(3, 4),
    "b": {"c": torch.zeros((), dtype=torch.int64), "d": torch.zeros(2, dtype=torch.bfloat16)},
    "bool": torch.zeros(2, dtype=torch.bool),
    "value": [1, "x"],
}


@pytest.fixture(params=["OLMo-core", "PyTorch"])
def content(request: pytest.FixtureRequest, tmp_path: Path) -> bytes:
    """Metadata as two libraries write it."""
    if request.param == "OLMo-core":
        save_state_dict(tmp_path, STATE)
    else:
        dist_cp.save(STATE, checkpoint_id=tmp_path)
    return (tmp_path / ".metadata").read_bytes()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_equals_what_pickle_reads(content: bytes, protocol: int) -> None:
    expected = pickle.loads(content)  # written just above
    found = parse_metadata(pickle.dumps(expected, protocol=protocol))
    assert found.state_dict_metadata == expected.state_dict_metadata
    assert found.storage_data == expected.storage_data
    assert found.planner_data == expected.planner_data
    assert isinstance(found, Metadata)
    assert found.state_dict_metadata["b.d"].properties.dtype is torch.bfloat16


@pytest.mark.parametrize("kind", PICKLES)
def test_nothing_is_run(kind: str, tmp_path: Path) -> None:
    content = PICKLES[kind](tmp_path / "marker")
    with pytest.raises(pickle.UnpicklingError, match=r"it names \S+, which is not data"):
        parse_metadata(content)
    assert not (tmp_path / "marker").exists()
    with contextlib.suppress(Exception):
        pickle.loads(content)
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "function", [print, getattr, type, torch.load, torch.zeros, torch.nn.Linear, collections.deque, Metadata.__init__]
)
def test_other_names_are_refused(function: Any) -> None:
    with pytest.raises(pickle.UnpicklingError, match="which is not data"):
        parse_metadata(pickle.dumps(Call(function, 1)))


def test_types_are_not_changed() -> None:
    """A pickle can set attributes of what it names: here `MetadataIndex.fqn = "changed"`."""
    named = b"\x8c%torch.distributed.checkpoint.metadata\x8c\rMetadataIndex\x93"
    with pytest.raises(ValueError, match="is not the metadata of a checkpoint"):
        parse_metadata(b"\x80\x04" + named + b"N}\x8c\x03fqn\x8c\x07changeds\x86b.")
    assert not hasattr(MetadataIndex, "fqn")
    assert not hasattr(TensorProperties, "changed")


@pytest.mark.parametrize("other", [b"", b"text", pickle.dumps({}), pickle.dumps(3), pickle.dumps(torch.Size([3]))])
def test_other_content(other: bytes) -> None:
    with pytest.raises((EOFError, ValueError, pickle.UnpicklingError)):
        parse_metadata(other)


def test_entries_of_another_kind(content: bytes) -> None:
    metadata = pickle.loads(content)  # written just above
    entries = metadata.state_dict_metadata
    sizes = replace(entries["a"], size=[3, 4])
    for changed in (entries | {3: entries["a"]}, entries | {"a": sizes}):
        metadata.state_dict_metadata = changed
        with pytest.raises(ValueError, match="is not described as a tensor or a value"):
            parse_metadata(pickle.dumps(metadata))
