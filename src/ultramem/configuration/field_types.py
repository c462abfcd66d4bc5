"""Type checks of configuration values, the same for Python and YAML."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ultramem.errors import ConfigError

TINIEST, LARGEST = 1e-30, 1e30  # of numbers in a configuration: products with them do not leave float32's range
LONGEST_SHOWN = 100  # characters of a value in an error
_OF_64_BITS = "from -2**63 to 2**63 - 1"
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text; put it in quotes if it looks like something else",
    Path: "a path",
}


def check_types(config: Any) -> None:
    """Check a dataclass's values against its annotations; called in its `__post_init__`.

    Fields may be bool, int, float, str, Path, a `Literal`, another dataclass, a tuple of these, a Mapping of names to
    these, Any, or one of these or None. Strings are converted to Path, lists to tuples, and NumPy numbers to Python
    numbers, as the field requires.

    Raises:
        ConfigError: a value is of the wrong type, is not finite or has more than 64 bits; the error names the field.
    """
    for name, hint in field_types(type(config)).items():  # type: ignore[arg-type]
        object.__setattr__(config, name, _checked(hint, getattr(config, name), name))


def check_range(
    config: Any,
    *names: str,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> None:
    """Check that fields of a dataclass are None or numbers in a range, which float32 can hold.

    Raises:
        ConfigError: a value is out of the range; the error names the field.
    """
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    what = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if math.isfinite(bound))
    for name in names:
        value = getattr(config, name)
        if value is not None:
            check_field(config, name, least <= value <= most and above < value < below, what)
            fits = isinstance(value, int) or value == 0 or TINIEST <= abs(value) <= LARGEST
            check_field(config, name, fits, f"0 or from {TINIEST} to {LARGEST} in size, for float32")


def check_least(least: int, **values: int | None) -> None:
    """Check that whole numbers, given by name, are None or at least `least`, and of at most 64 bits.

    Raises:
        ConfigError: a value is below `least`, or too large.
    """
    for name, value in values.items():
        if value is not None:
            _required(value >= least, value, name, f"at least {least}")
            _required(is_64_bit(value), value, name, _OF_64_BITS)


def is_64_bit(number: int) -> bool:
    """Whether a whole number fits into 64 bits with a sign."""
    return -(2**63) <= number < 2**63


def check_field(config: Any, name: str, right: bool, what: str) -> None:
    """Raise an error for a field of a dataclass unless it is right.

    Raises:
        ConfigError: the field is not right; the message names it, its value and what it must be.
    """
    _required(right, getattr(config, name), name, what)


@cache
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
    if hint is Any:
        return value
    if get_origin(hint) is Literal:
        return _required(value in get_args(hint), value, name, f"one of {', '.join(map(str, get_args(hint)))}")
    if get_origin(hint) is tuple:
        return _checked_items(hint, value, name)
    if get_origin(hint) is Mapping:
        _required(isinstance(value, Mapping), value, name, "a section of keys and values")
        return {key: _checked(get_args(hint)[1], item, f"{name}.{key}") for key, item in value.items()}
    if is_dataclass(hint):
        what = f"a section of keys and values, in Python {hint.__name__}(...)"  # type: ignore[union-attr]
        return _required(isinstance(value, hint), value, name, what)  # type: ignore[arg-type]
    if hint in (int, float):
        right = isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
        _required(right, value, name, _WORDS[hint])
        if isinstance(value, Integral):
            return _required(is_64_bit(int(value)), int(value), name, _OF_64_BITS)
        return float(_required(math.isfinite(value), value, name, "a finite number"))
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
        raise ConfigError(f"{name}={shown(value)}: must be {what}")
    return value


def shown(value: Any) -> str:
    """A value as errors show it, shortened."""
    try:
        text = repr(list(value) if isinstance(value, tuple) else value)  # as YAML has it
    except ValueError:  # Python writes no more than 4300 digits
        return "..."
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
