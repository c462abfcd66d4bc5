"""Conversion between nested mappings, as read from YAML, and configuration dataclasses. Errors name the key."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from ultramem.configuration.field_types import LONGEST_SHOWN, field_types, is_64_bit, item_types, shown, without_none
from ultramem.errors import ConfigError

T = TypeVar("T")


def decode(kind: type[T], content: Any, known_keys: list[str] | None = None, path: str = "") -> T:
    """Make a dataclass, which checks its values' types itself, from nested mappings.

    Whole numbers count as integers in any notation, such as 1e9.

    Args:
        kind: the dataclass; its `__post_init__` calls `check_types`.
        content: mapping of field names to values; None for an empty one.
        known_keys: all dotted keys, for the hint in the error for an unknown key; None to leave out unknown keys.
        path: dotted key of `content`; empty at the top.

    Raises:
        ConfigError: a key is unknown or missing, or a value is of the wrong type or invalid.
    """
    if content is None:
        content = {}
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path or 'configuration'}={shown(content)}: must be a section of keys and values")
    hints = field_types(kind)  # type: ignore[arg-type]
    if known_keys is None:
        content = {name: value for name, value in content.items() if name in hints}
    for name in content:
        if name not in hints:
            key = _join(path, name if str(name).isprintable() else repr(name))[:LONGEST_SHOWN]
            nearest = difflib.get_close_matches(key, known_keys or (), 1, 0)[0]
            raise ConfigError(f"{key}: unknown key; did you mean {nearest}?")
    for field in fields(kind):  # type: ignore[arg-type]
        required = field.default is MISSING and field.default_factory is MISSING
        if required and field.name not in content:
            raise ConfigError(f"{_join(path, field.name)} is missing; set it")
    values = {name: _value(hints[name], value, known_keys, _join(path, name)) for name, value in content.items()}
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(_join(path, str(error))) from error


def dotted_keys(kind: type, path: str = "") -> Iterator[str]:
    """The dotted keys of all fields of a dataclass and of the dataclasses in it."""
    for name, hint in field_types(kind).items():
        key = _join(path, name)
        yield key
        section, _ = without_none(hint)
        if is_dataclass(section):
            yield from dotted_keys(section, key)  # type: ignore[arg-type]


def encode(value: Any) -> Any:
    """The reverse of `decode`: nested mappings, lists, numbers and texts."""
    if is_dataclass(value):
        return {field.name: encode(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _value(hint: Any, value: Any, known_keys: list[str] | None, path: str) -> Any:
    """Convert a value to the field's type; one of the wrong type is returned as it is, for the dataclass to refuse."""
    kind, optional = without_none(hint)
    if value is None and optional:
        return None
    if is_dataclass(kind):
        return decode(kind, value, known_keys, path)  # type: ignore[arg-type]
    if get_origin(kind) is Mapping and isinstance(value, Mapping):
        item_kind = get_args(kind)[1]
        return {name: _value(item_kind, item, known_keys, _join(path, name)) for name, item in value.items()}
    if get_origin(kind) is tuple and isinstance(value, list):
        kinds = item_types(kind, len(value))
        if len(kinds) == len(value):
            return [_value(item_kind, item, known_keys, path) for item_kind, item in zip(kinds, value, strict=True)]
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and is_64_bit(value):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer() and is_64_bit(int(value)):
        return int(value)
    return value


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else str(name)
