"""Configurations whose model is that of the initial weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ultramem.convert.transformers_models import to_transformers_config
from ultramem.errors import ConfigError, UltraMemError
from ultramem.hosts.olmo_core import ModelConfig, MoEConfig
from ultramem.runs import config_files
from ultramem.training import load_config


@pytest.fixture
def other(make_config: Callable[..., Any], tmp_path: Path) -> ModelConfig:
    """The model whose configuration is in the directory `model`."""
    model: ModelConfig = make_config().model
    to_transformers_config(model).save_pretrained(tmp_path / "model")
    return replace(model, init_std=model.linear_std)


@pytest.fixture
def write(token_directory: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a configuration that starts from that directory, with a model section if one is given."""

    def write(**sections: object) -> Path:
        content: dict[str, object] = {
            "data": {"directory": str(token_directory), "sequence_length": 16},
            "trainer": {
                "directory": str(tmp_path / "run"), "batch_size": 128, "steps": 2,
                "initial_weights": str(tmp_path / "model"),
            },
            **sections,
        }  # fmt: skip
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def test_the_model_is_the_others(other: ModelConfig, write: Callable[..., Path]) -> None:
    assert load_config(write()).model == other
    assert load_config(write(model=None)).model == other


def test_a_value_is_replaced(other: ModelConfig, write: Callable[..., Path]) -> None:
    assert other.memory is not None
    assert load_config(write(), ["--model.seed=1"]).model == replace(other, seed=1)
    assert load_config(write(model={"seed": 2})).model == replace(other, seed=2)
    memory = replace(other.memory, output_dropout=0.5)
    assert load_config(write(), ["--model.memory.output_dropout=0.5"]).model == replace(other, memory=memory)
    assert load_config(write(), ["--model.memory=null"]).model == replace(other, memory=None)
    moe = MoEConfig(hidden_size=16)
    changed = load_config(write(), ["--model.memory=null", "--model.moe={hidden_size: 16}"]).model
    assert changed == replace(other, memory=None, moe=moe)


def test_a_relative_path_starts_at_the_working_directory(
    other: ModelConfig, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(write(), ["--trainer.initial_weights=model", "--model.seed=1"])
    assert (config.model.seed, config.trainer.initial_weights) == (1, tmp_path / "model")


def test_a_model_section_of_its_own(other: ModelConfig, write: Callable[..., Path], tmp_path: Path) -> None:
    sizes = {"d_model": 32, "num_blocks": 3, "num_heads": 2, "feed_forward_size": 48}
    assert load_config(write(model=sizes)).model == ModelConfig(**sizes, vocab_size=128)  # that of the data
    assert load_config(write(model={"preset": "dense_small"})).model.d_model != other.d_model


def test_mistakes(other: ModelConfig, write: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"^model\.sed: unknown key; did you mean model\.seed\?"):
        load_config(write(), ["--model.sed=1"])
    with pytest.raises(UltraMemError, match=r"nowhere has no config\.json"):
        load_config(write(), ["--trainer.initial_weights=nowhere", "--model.seed=1"])
    with pytest.raises(ConfigError, match=r"^model\.d_model is missing"):
        config_files.load_config(write(), ["--model.seed=1"])  # by which no other model is read
