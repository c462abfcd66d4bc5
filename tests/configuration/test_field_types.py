"""Configurations take values of exactly their fields' types."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ultramem.configuration.field_types import check_types
from ultramem.errors import ConfigError


@dataclass
class Config:
    switch: bool = False
    count: int = 1
    limit: int | None = None
    rate: float = 0.5
    name: str = "a"
    path: Path | None = None


@pytest.mark.parametrize(
    ("field", "value"),
    [("switch", True), ("count", 0), ("limit", 3), ("limit", None), ("rate", 1), ("name", ""), ("path", 7)],
)
def test_right(field: str, value: Any) -> None:
    check_types(Config(**{field: value}))


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("switch", 1, "of type bool"),
        ("switch", None, "of type bool"),
        ("count", True, "of type int"),
        ("count", 1.0, "of type int"),
        ("count", None, "of type int"),
        ("limit", "3", r"of type int \| None"),
        ("rate", math.nan, "a finite number"),
        ("rate", "0.5", "a finite number"),
        ("rate", False, "a finite number"),
        ("rate", None, "a finite number"),
        ("name", 3, "of type str"),
    ],
)
def test_wrong(field: str, value: Any, what: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}={value!r}: must be {what}$"):
        check_types(Config(**{field: value}))
