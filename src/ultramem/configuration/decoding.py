"""From YAML to configuration dataclasses, with errors that name the key."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from ultramem.errors import ConfigError

T = TypeVar("T")

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text; put it in quotes if it looks like something else",
    Path: "a path",
}


class _Loader(yaml.SafeLoader):
    """Reads scalars as YAML 1.2 does, where 1e-4 is a number, 2:5 a text, and so are yes and no."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", [*"-+0123456789"]),
    ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", [*"-+."]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def parse_yaml(text: str, source: str) -> Any:
    """The content of a YAML text.

    Args:
        text: the text.
        source: where it is from, for errors.

    Raises:
        ConfigError: a syntax error, with its line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise ConfigError(f"{source}{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {str(error).splitlines()[0]}") from error


def set_key(content: dict[str, Any], key: str, value: Any) -> None:
    """Set what the dotted `key`, such as `model.memory.top_k`, names in nested mappings, making those that lack."""
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(content.get(section), dict):
            content[section] = {}
        content = content[section]
    content[name] = value


def decode(kind: type[T], content: Any, known_keys: list[str], path: str = "") -> T:
    """A dataclass from nested mappings, with values of exactly its fields' types.

    Numbers that are whole count as integers however they are written (1e9).

    Args:
        kind: the dataclass.
        content: mapping of field names to values; None for an empty one.
        known_keys: all dotted keys, for the hint in an error about one that does not exist.
        path: dotted key of `content`; empty at the top.

    Raises:
        ConfigError: a key that does not exist or is missing, or a value of the wrong type or that cannot work.
    """
    if content is None:
        content = {}
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path or 'configuration'}={content!r}: must be a section of keys and values")
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in content:
        if name not in fields:
            raise _unknown(_join(path, name), known_keys)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in content:
            raise ConfigError(f"{_join(path, name)} is missing: set it")
    values = {name: _value(hints[name], value, known_keys, _join(path, name)) for name, value in content.items()}
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(_join(path, str(error))) from error


def dotted_keys(kind: type, path: str = "") -> Iterator[str]:
    """The dotted keys of all fields of a dataclass and of the dataclasses in it."""
    for name, hint in get_type_hints(kind).items():
        key = _join(path, name)
        yield key
        for option in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(option):
                yield from dotted_keys(option, key)  # type: ignore[arg-type]


def encode(value: Any) -> Any:
    """The reverse of `decode`: nested mappings, lists, numbers and texts."""
    if dataclasses.is_dataclass(value):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _value(hint: Any, value: Any, known_keys: list[str], path: str) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (option for option in get_args(hint) if option is not types.NoneType)
    if dataclasses.is_dataclass(hint):
        return decode(hint, value, known_keys, path)  # type: ignore[arg-type]
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"{path}={value!r}: must be one of {', '.join(map(str, get_args(hint)))}")
        return value
    if get_origin(hint) is tuple:
        return _items(get_args(hint), value, known_keys, path)
    return _scalar(hint, value, path)


def _items(hints: tuple[Any, ...], value: Any, known_keys: list[str], path: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{path}={value!r}: must be a list, such as [a, b]")
    if hints[-1] is Ellipsis:
        hints = hints[:1] * len(value)
    if len(value) != len(hints):
        raise ConfigError(f"{path}={value!r}: must be a list of {len(hints)} values")
    return tuple(
        _value(hint, item, known_keys, f"{path}[{i}]") for i, (hint, item) in enumerate(zip(hints, value, strict=True))
    )


def _scalar(kind: type, value: Any, path: str) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number:
        return float(value)
    if kind is int and number and float(value).is_integer():
        return int(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if isinstance(value, kind) and not number:
        return value
    raise ConfigError(f"{path}={value!r}: must be {_WORDS[kind]}")


def _unknown(key: str, known_keys: list[str]) -> ConfigError:
    nearest = difflib.get_close_matches(key, known_keys, 1, 0)[0]
    return ConfigError(f"{key}: there is no such key; did you mean {nearest}?")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else str(name)
