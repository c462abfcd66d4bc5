"""Overrides: configuration values replaced on the command line by their dotted keys."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ultramem.configuration.field_types import LONGEST_SHOWN
from ultramem.configuration.yaml_text import parse_yaml
from ultramem.errors import ConfigError


def apply_overrides(content: dict[str, Any], overrides: Iterable[str]) -> None:
    """Replace values in nested mappings.

    Args:
        content: nested mappings, changed in place.
        overrides: overrides such as `--optimizer.learning_rate=3e-4` or `model.memory=null`; values are YAML.

    Raises:
        ConfigError: an override has no value, is given twice, or its value is not valid YAML.
    """
    given = set()
    for override in overrides:
        key, separator, value = override.removeprefix("--").partition("=")
        if not separator or not re.fullmatch(r"[\w.]{1,100}", key):
            written = override if override.isprintable() else repr(override)
            raise ConfigError(
                f"{written[:LONGEST_SHOWN]}: is not an option; to replace a value write --KEY=VALUE, such as "
                "--trainer.steps=100"
            )
        if key in given:
            raise ConfigError(f"--{key}: is given twice; leave out one of them")
        given.add(key)
        set_key(content, key, parse_yaml(value, f"--{key}"))


def set_key(content: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a dotted key, such as `model.memory.top_k`, and create missing mappings on the way."""
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(content.get(section), dict):
            content[section] = {}
        content = content[section]
    content[name] = value
