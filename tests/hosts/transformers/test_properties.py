"""`memory_config.json` of any content gives a memory, or one line that names the file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given

from hostile import allowed, json_files
from ultramem import MemoryConfig
from ultramem.hosts.transformers.files import _read_memory_config

CONTENT = {"memory": dataclasses.asdict(MemoryConfig()), "d_model": 32, "num_blocks": 3, "base_model": "llama"}


@given(content=json_files(CONTENT))
def test_any_configuration(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = Path(tmp_path_factory.getbasetemp()) / "memory_config.json"
    path.write_bytes(content)
    with allowed():
        assert _read_memory_config(path).memory.num_keys > 0
