"""Whether the values of a configuration are of its fields' types."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from ultramem.errors import ConfigError


def check_types(config: Any) -> None:
    """Check a dataclass' fields of type bool, int, float and str, or one of these and None; others are left alone.

    Its module defers annotations (`from __future__ import annotations`).

    Raises:
        ConfigError: a value is of another type, or a number is not finite; names the field.
    """
    for field in fields(config):
        value, (kind, *none) = getattr(config, field.name), str(field.type).split(" | ")
        if value is None and none:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        right = {
            "bool": isinstance(value, bool),
            "int": number and isinstance(value, int),
            "float": number and math.isfinite(value),
            "str": isinstance(value, str),
        }
        if not right.get(kind, True):
            what = "a finite number" if kind == "float" else f"of type {field.type}"
            raise ConfigError(f"{field.name}={value!r}: must be {what}")
