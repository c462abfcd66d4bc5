"""Type checks of configuration values, the same for Python and YAML."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ultramem.errors import ConfigError

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text; put it in quotes if it looks like something else",
    Path: "a path",
}


def check_types(config: Any) -> None:
    """Check a dataclass's values against its annotations; called in its `__post_init__`.

    Fields may be bool, int, float, str, Path, a `Literal`, another dataclass, a tuple of these, or one of these or
    None. Strings are converted to Path, lists to tuples, and NumPy numbers to Python numbers, as the field requires.

    Raises:
        ConfigError: a value is of the wrong type; the error names the field.
    """
    for name, hint in field_types(type(config)).items():
        object.__setattr__(config, name, _checked(hint, getattr(config, name), name))


def check_finite(config: Any) -> None:
    """Check that a dataclass's numbers are finite.

    Raises:
        ConfigError: a number is infinite or NaN; the error names the field.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{field.name}={value}: must be a finite number")


def check_least(least: int, **values: float | None) -> None:
    """Check that values, given by name, are None or at least `least`.

    Raises:
        ConfigError: a value is below `least`.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise ConfigError(f"{name}={value}: must be at least {least}")


def check_field(config: Any, name: str, right: bool, what: str) -> None:
    """Raise an error for a field of a dataclass unless it is right.

    Raises:
        ConfigError: the field is not right; the message names it, its value and what it must be.
    """
    _required(right, getattr(config, name), name, what)


def field_types(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields, by name."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def without_none(hint: Any) -> tuple[Any, bool]:
    """A type without None, and whether it allowed None."""
    if get_origin(hint) not in (Union, UnionType):
        return hint, False
    (kind,) = (option for option in get_args(hint) if option is not NoneType)
    return kind, True


def item_types(hint: Any, count: int) -> tuple[Any, ...]:
    """The types of a tuple's items; `count` types if the tuple may have any length."""
    kinds = get_args(hint)
    return kinds[:1] * count if kinds[-1] is Ellipsis else kinds


def _checked(hint: Any, value: Any, name: str) -> Any:
    hint, optional = without_none(hint)
    if value is None and optional:
        return None
    if get_origin(hint) is Literal:
        return _required(value in get_args(hint), value, name, f"one of {', '.join(map(str, get_args(hint)))}")
    if get_origin(hint) is tuple:
        return _checked_items(hint, value, name)
    if is_dataclass(hint):
        what = f"a section of keys and values, in Python {hint.__name__}(...)"  # type: ignore[union-attr]
        return _required(isinstance(value, hint), value, name, what)  # type: ignore[arg-type]
    if hint in (int, float):
        right = isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
        number = _required(right, value, name, _WORDS[hint])
        return number if isinstance(number, int) else hint(number)
    if hint is Path and isinstance(value, str | Path):
        return _checked_path(str(value), name)
    return _required(isinstance(value, hint), value, name, _WORDS[hint])


def _checked_path(value: str, name: str) -> Path:
    _required(value != "", value, name, "a path; write . for the working directory")
    _required("\0" not in value, value, name, "a path without NUL characters")
    _required(_is_unicode(value), value, name, "a path in valid Unicode; rename the file")
    _required(not value.startswith("~"), value, name, "a path without ~, which only shells replace; write it out")
    return Path(value)


def _is_unicode(text: str) -> bool:
    """Whether a text holds no surrogates, which stand for bytes of a name that is not in UTF-8."""
    return text.encode(errors="replace").decode() == text


def _checked_items(hint: Any, value: Any, name: str) -> tuple[Any, ...]:
    _required(isinstance(value, list | tuple), value, name, "a list, such as [a, b]")
    kinds = item_types(hint, len(value))
    _required(len(value) == len(kinds), value, name, f"a list of {len(kinds)} values")
    return tuple(_checked(kind, item, f"{name}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _required(right: bool, value: Any, name: str, what: str) -> Any:
    """The value, if it is right."""
    if not right:
        shown = list(value) if isinstance(value, tuple) else value  # as YAML has it
        raise ConfigError(f"{name}={shown!r}: must be {what}")
    return value
