"""A run's configuration of any content, with any override, is loaded or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hostile import allowed, damaged, json_files, numbers, texts, values
from ultramem.configuration.decoding import dotted_keys
from ultramem.configuration.yaml_text import dump_yaml
from ultramem.runs.config import RunConfig
from ultramem.runs.config_files import load_config
from ultramem.runs.contents import recorded_contents
from ultramem.runs.directory import recorded_metrics

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


FILE = {"file": "part-00000.npy", "bytes": 200, "crc32": "0123abcd"}


@given(content=json_files({"system": "dense", "data": {"train": [FILE], "heldout": [], "tokenizer": FILE}}))
def test_any_record_of_the_data(file: Path, content: bytes) -> None:
    (file.parent / "summary.json").write_bytes(content)
    with allowed():
        recorded_contents(file.parent)


@given(content=damaged('{"step": 1, "time": 0.5, "metrics": {"train/CE loss": 3.5}}\n' * 2), step=st.integers(0, 2))
def test_any_metrics_to_go_on_from(file: Path, content: bytes, step: int) -> None:
    metrics = file.with_name("metrics.jsonl")
    metrics.write_bytes(content)
    assert all(isinstance(value, float) for value in recorded_metrics(metrics, step).values())
