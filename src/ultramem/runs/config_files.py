"""Reading a run's configuration from a YAML file and command-line overrides."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ultramem.config import MemoryConfig
from ultramem.configuration.decoding import decode, dotted_keys, encode
from ultramem.configuration.overrides import apply_overrides
from ultramem.configuration.yaml_text import read_yaml
from ultramem.errors import ConfigError
from ultramem.hosts.olmo_core import ModelConfig, preset
from ultramem.layers import KINDS
from ultramem.runs.config import DataConfig, RunConfig
from ultramem.runs.layout import CONFIG_NAME
from ultramem.runs.tokens import open_token_data

VOCABULARY_MULTIPLE = 128  # embedding rows: matrix products on GPUs are fastest so
_REQUIRED_OF_A_MODEL = {item.name for item in dataclasses.fields(ModelConfig) if item.default is dataclasses.MISSING}


def load_config(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    read_model: Callable[[Path], ModelConfig] | None = None,
) -> RunConfig:
    """Read a YAML file.

    Args:
        path: the file.
        overrides: overrides such as `--optimizer.learning_rate=3e-4` or `model.memory=null`; values are YAML.
        read_model: reads the configuration of the model in the directory `trainer.initial_weights`. It is the base of
            the model section, unless that names a preset or describes a whole model.

    Raises:
        ConfigError: the file is missing or not valid, or a key or value is invalid.
        UltraMemError: the vocabulary size is that of the data, and the data is missing or damaged.
    """
    content = read_yaml(path)
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must have sections of keys and values, such as `trainer:` with `steps: 1000`")
    apply_overrides(content, overrides)
    keys = [*dotted_keys(RunConfig), "model.preset"]
    other = _read_other_model(content, read_model)
    if other is not None or isinstance(content.get("model"), dict):
        content["model"] = _resolve_model(content, other, keys)
    return decode(RunConfig, content, keys)


def load_stored_config(path: Path) -> RunConfig:
    """Read the configuration that a run has written; version 0.1 had AdamW alone for tables, and did not say so.

    Raises:
        ConfigError: as `load_config`.
    """
    overrides = ["model.memory.optimizer=adamw"] if _is_of_version_0_1(path) else []
    return load_config(path, overrides)


def as_begun(config: RunConfig) -> RunConfig:
    """With the optimizer of tables that a run of version 0.1 in the run directory began with; else as it is."""
    path, memory = config.trainer.directory / CONFIG_NAME, config.model.memory
    if memory is None or not path.is_file():
        return config
    try:
        begun = load_stored_config(path).model.memory if _is_of_version_0_1(path) else None
    except ConfigError:  # `RunDirectory` says what is wrong with it, and what to do
        return config
    if begun is None:
        return config
    names = ("optimizer", "value_lr", "value_lr_multiplier", "value_lr_decay", "row_beta")
    memory = dataclasses.replace(memory, **{name: getattr(begun, name) for name in names})
    return dataclasses.replace(config, model=dataclasses.replace(config.model, memory=memory))


def _is_of_version_0_1(path: Path) -> bool:
    """Whether that version wrote this, with a memory: all of its fields, but not yet the optimizer.

    A user's own file, which may stand in the run directory too, names only some.
    """
    content = read_yaml(path)
    model = content.get("model") if isinstance(content, dict) else None
    memory = model.get("memory") if isinstance(model, dict) else None
    return isinstance(memory, dict) and "optimizer" not in memory and "value_lr_decay" in memory


def _read_other_model(
    content: dict[str, Any], read_model: Callable[[Path], ModelConfig] | None
) -> dict[str, Any] | None:
    """The model of the initial weights, unless the model section describes a whole model."""
    trainer, section = content.get("trainer"), content.get("model") or {}
    weights = trainer.get("initial_weights") if isinstance(trainer, dict) else None
    if read_model is None or not isinstance(weights, str) or not isinstance(section, dict):
        return None
    described = "preset" in section or section.keys() >= _REQUIRED_OF_A_MODEL
    return None if described else encode(read_model(Path(weights)))


def _resolve_model(content: dict[str, Any], other: dict[str, Any] | None, keys: list[str]) -> dict[str, Any]:
    """The model section merged into the other model or the preset, with the data's vocabulary size filled in."""
    section = dict(content.get("model") or {})
    if other is not None:
        return _on_top(other, section)
    if "vocab_size" not in section:
        data = open_token_data(decode(DataConfig, content.get("data"), keys, "data"))
        section["vocab_size"] = math.ceil(data.vocab_size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    name = section.pop("preset", None)
    if name is None:
        return section
    try:
        return _on_top(encode(preset(name)), section)
    except ConfigError as error:
        raise ConfigError(f"model.{error}") from error


def _on_top(base: dict[str, Any], section: dict[str, Any]) -> dict[str, Any]:
    """A model's values, some of them replaced by a section, also in its memory or mixture of experts."""
    section = dict(section)
    for part in ("memory", "moe"):
        if isinstance(section.get(part), dict) and base[part] is not None:
            given, kept = section[part], dict(base[part])
            if given.get("optimizer", kept.get("optimizer")) != kept.get("optimizer"):
                del kept["value_lr"]  # a rate for the other one
            if given.get("kind", kept.get("kind")) != kept.get("kind"):
                kept = _for_another_kind(kept, given["kind"])
            section[part] = kept | given
    return base | section


def _for_another_kind(memory: dict[str, Any], kind: Any) -> dict[str, Any]:
    """A memory's values without those that the new kind has its own defaults for or does not use."""
    unused = KINDS[kind].unused if isinstance(kind, str) and kind in KINDS else ()
    prescribed = {field.name for field in dataclasses.fields(MemoryConfig) if field.default is None}
    return {name: value for name, value in memory.items() if name not in prescribed and name not in unused}
