"""A run's configuration of any content, with any override, is loaded or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hostile import allowed, damaged, numbers, texts, values
from ultramem.configuration.decoding import dotted_keys
from ultramem.configuration.yaml_text import dump_yaml
from ultramem.runs.config import RunConfig
from ultramem.runs.config_files import load_config

VALID = """\
model: {preset: ultramem_v2_227m, memory: {top_k: 8}}
data: {directory: DATA, sequence_length: 16}
trainer: {directory: run, batch_size: 64, steps: 10}
"""
KEYS = [*dotted_keys(RunConfig), "model.preset", "model.memory.kind.x"]


@pytest.fixture(scope="module")
def file(token_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("any") / "run.yaml"
    path.write_text(VALID.replace("DATA", str(token_directory)))
    return path


@given(content=damaged(VALID))
def test_any_file(file: Path, content: bytes) -> None:
    other = file.with_name("other.yaml")
    other.write_bytes(content)
    with allowed():
        load_config(other)


@given(key=st.sampled_from(KEYS), value=numbers | texts | values.map(dump_yaml))
@example("model.preset", "[a]")
@example("model.preset", "{a: b}")
@example("model", "[]")
@example("model.memory", "[]")
@example("model.memory.kind", "[]")
@example("data", "3")
def test_any_override(file: Path, key: str, value: str) -> None:
    with allowed():
        load_config(file, [f"--{key}={value}"])
