"""Configurations take values of exactly their fields' types, from Python and from YAML, and say the same of others."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from ultramem.config import MemoryConfig
from ultramem.configuration.decoding import decode
from ultramem.configuration.field_types import check_range, check_types, field_types
from ultramem.errors import ConfigError
from ultramem.hosts.olmo_core import ModelConfig, MoEConfig
from ultramem.runs.config import (
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainerConfig,
    WandbConfig,
)


@dataclass(frozen=True)
class Section:
    number: int = 1

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True)
class Config:
    switch: bool = False
    count: int = 1
    limit: int | None = None
    rate: float = 0.5
    name: str = "a"
    path: Path = Path()
    other: Path | None = None
    choice: Literal["one", "two"] = "one"
    pair: tuple[float, float] = (0.0, 1.0)
    paths: tuple[Path, ...] = ()
    section: Section = field(default_factory=Section)
    maybe: Section | None = None

    def __post_init__(self) -> None:
        check_types(self)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("switch", True),
        ("count", 0),
        ("limit", 3),
        ("limit", None),
        ("rate", 1),
        ("name", ""),
        ("path", Path("a")),
        ("other", None),
        ("choice", "two"),
        ("pair", (1, 0.5)),
        ("section", Section(2)),
        ("maybe", None),
    ],
)
def test_right(name: str, value: Any) -> None:
    found = getattr(Config(**{name: value}), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("path", "a/b", Path("a/b")),
        ("other", "a/b", Path("a/b")),
        ("paths", ["a", Path("b")], (Path("a"), Path("b"))),
        ("pair", [1, 2.5], (1, 2.5)),
        ("count", np.int64(3), 3),
        ("rate", np.float32(0.5), 0.5),
    ],
)
def test_kept_as_the_fields_type(name: str, value: Any, kept: Any) -> None:
    found = getattr(Config(**{name: value}), name)
    assert found == kept
    assert type(found) is type(kept)


WRONG: list[tuple[str, Any, str]] = [
    ("switch", 1, "switch=1: must be true or false"),
    ("switch", None, "switch=None: must be true or false"),
    ("count", True, "count=True: must be a whole number"),
    ("count", 1.5, "count=1.5: must be a whole number"),
    ("count", None, "count=None: must be a whole number"),
    ("count", "64", "count='64': must be a whole number"),
    ("limit", "3", "limit='3': must be a whole number"),
    ("rate", "0.5", "rate='0.5': must be a number"),
    ("rate", False, "rate=False: must be a number"),
    ("rate", None, "rate=None: must be a number"),
    ("name", 3, "name=3: must be text; put it in quotes if it looks like something else"),
    ("path", 7, "path=7: must be a path"),
    ("path", "a\0b", "path='a\\x00b': must be a path without NUL characters"),
    ("other", 7, "other=7: must be a path"),
    ("choice", "three", "choice='three': must be one of one, two"),
    ("choice", None, "choice=None: must be one of one, two"),
    ("choice", ["one"], "choice=['one']: must be one of one, two"),
    ("pair", 0.5, "pair=0.5: must be a list, such as [a, b]"),
    ("pair", [0.5], "pair=[0.5]: must be a list of 2 values"),
    ("pair", [0.5, "x"], "pair[1]='x': must be a number"),
    ("paths", "a", "paths='a': must be a list, such as [a, b]"),
    ("paths", ["a", 3], "paths[1]=3: must be a path"),
    ("section", 5, "section=5: must be a section of keys and values"),
    ("maybe", 5, "maybe=5: must be a section of keys and values"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_wrong_in_python_and_in_yaml(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as from_python:
        Config(**{name: value})
    with pytest.raises(ConfigError) as from_yaml:
        decode(Config, {name: value}, [])
    for error in (from_python, from_yaml):
        assert str(error.value).startswith(message)
        assert name in ("section", "maybe") or str(error.value) == message


def test_a_whole_number_may_have_a_point_in_yaml_alone() -> None:
    assert decode(Config, {"count": 1e9}, []).count == 10**9
    with pytest.raises(ConfigError, match=r"^count=1\.0: must be a whole number$"):
        Config(count=1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite(value: float) -> None:
    with pytest.raises(ConfigError, match=f"^rate={value}: must be a finite number$"):
        Config(rate=value)


@dataclass(frozen=True)
class Numbers:
    number: float | None = 0.5

    def __post_init__(self) -> None:
        check_types(self)


@pytest.mark.parametrize(
    ("value", "bounds", "what"),
    [
        (None, {"least": 1}, None),
        (1, {"least": 1, "most": 1}, None),
        (0.0, {"least": 0}, None),
        (-0.0, {"above": 0}, "above 0"),
        (0.5, {"least": 1, "most": 4}, "at least 1 and at most 4"),
        (5, {"least": 1, "most": 4}, "at least 1 and at most 4"),
        (1.0, {"above": 0, "below": 1}, "above 0 and below 1"),
        (2**62, {"least": 0}, None),
        (1e-31, {"above": 0}, "0 or from 1e-30 to 1e+30 in size, for float32"),
        (-1e31, {}, "0 or from 1e-30 to 1e+30 in size, for float32"),
    ],
)
def test_ranges(value: float | None, bounds: dict[str, float], what: str | None) -> None:
    if what is None:
        check_range(Numbers(value), "number", **bounds)
        return
    with pytest.raises(ConfigError) as error:
        check_range(Numbers(value), "number", **bounds)
    assert str(error.value) == f"number={value!r}: must be {what}"


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 2**70])
def test_numbers_beyond_64_bits(value: int) -> None:
    for name in ("count", "limit", "rate"):
        with pytest.raises(ConfigError, match=rf"^{name}={value}: must be from -2\*\*63 to 2\*\*63 - 1$"):
            Config(**{name: value})
    assert Config(count=2**63 - 1).count == 2**63 - 1


def test_long_values_are_shortened_in_errors() -> None:
    with pytest.raises(ConfigError, match=r"^count='x{99}\.\.\.: must be a whole number$"):
        Config(count="x" * 1000)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^count=\.\.\.: must be from"):
        Config(count=10**5000)
    with pytest.raises(ConfigError, match=r"^name=\.\.\.: must be text"):
        Config(name=[10**5000])  # type: ignore[arg-type]


REQUIRED: dict[type, dict[str, Any]] = {
    RunConfig: {},
    ModelConfig: {"d_model": 32, "num_blocks": 1, "num_heads": 2, "feed_forward_size": 48},
    MemoryConfig: {},
    MoEConfig: {"hidden_size": 16},
    DataConfig: {"directory": "tokens"},
    TrainerConfig: {"directory": "run", "batch_size": 64, "steps": 1},
    OptimizerConfig: {},
    ScheduleConfig: {},
    LoggingConfig: {},
    WandbConfig: {"project": "p"},
}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, item.name) for kind in REQUIRED for item in fields(kind) if item.name != "tokens"]
)
def test_every_field_of_a_run_is_checked(kind: type, name: str) -> None:
    if kind is RunConfig:
        sections = {
            section: of_section(**REQUIRED[of_section]) for section, of_section in field_types(RunConfig).items()
        }
        arguments = sections | {name: {"a": 1}}
    else:
        arguments = REQUIRED[kind] | {name: {"a": 1}}
    with pytest.raises(ConfigError, match=rf"^{name}={{'a': 1}}: must be "):
        kind(**arguments)


def test_the_words_of_the_command_line() -> None:
    with pytest.raises(ConfigError, match=r"^batch_size='64': must be a whole number$"):
        TrainerConfig(directory="x", batch_size="64")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "path='': must be a path; write . for the working directory"),
        ("a\0b", "path='a\\x00b': must be a path without NUL characters"),
        ("a\udcff", "path='a\\udcff': must be a path in valid Unicode; rename the file"),
        ("~", "path='~': must be a path without ~, which only shells replace; write it out"),
        ("~nobody/a", "path='~nobody/a': must be a path without ~, which only shells replace; write it out"),
    ],
)
def test_paths(text: str, message: str) -> None:
    for value in [text, *([Path(text)] if text else [])]:
        with pytest.raises(ConfigError) as raised:
            Config(path=value)  # type: ignore[arg-type]
        assert str(raised.value) == message
    for right in ("a/~", "./~", ".", "ä"):
        assert Config(path=right).path == Path(right)  # type: ignore[arg-type]
