"""Values of a configuration that are replaced by their dotted keys, as on the command line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ultramem.configuration.yaml_text import parse_yaml
from ultramem.errors import ConfigError


def apply_overrides(content: dict[str, Any], overrides: Iterable[str]) -> None:
    """Replace values in nested mappings.

    Args:
        content: is changed.
        overrides: such as `--optimizer.learning_rate=3e-4` or `model.memory=null`; values are YAML.

    Raises:
        ConfigError: one has no value, or one that is not valid YAML.
    """
    for override in overrides:
        key, separator, value = override.removeprefix("--").partition("=")
        if not separator:
            raise ConfigError(
                f"{override}: not an option; to replace a value write --KEY=VALUE, such as --trainer.steps=100"
            )
        set_key(content, key, parse_yaml(value, f"--{key}"))


def set_key(content: dict[str, Any], key: str, value: Any) -> None:
    """Set what the dotted `key`, such as `model.memory.top_k`, names in nested mappings, making those that lack."""
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(content.get(section), dict):
            content[section] = {}
        content = content[section]
    content[name] = value
