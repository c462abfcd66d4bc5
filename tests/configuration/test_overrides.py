"""Values replaced by their dotted keys."""

import pytest

from ultramem.configuration.overrides import apply_overrides, set_key
from ultramem.errors import ConfigError


def test_set_key_makes_sections():
    content = {"a": {"b": 1}, "c": None}
    set_key(content, "a.d", 2)
    set_key(content, "c.e.f", 3)
    set_key(content, "g", 4)
    assert content == {"a": {"b": 1, "d": 2}, "c": {"e": {"f": 3}}, "g": 4}


def test_values_are_yaml():
    content = {"a": {"b": 1}}
    apply_overrides(content, ["--a.b=1e-4", "a.c=[1, x]", "--d=null"])
    assert content == {"a": {"b": 1e-4, "c": [1, "x"]}, "d": None}
    with pytest.raises(ConfigError, match=r"^--a\.b: is not an option; to replace a value write --KEY=VALUE"):
        apply_overrides(content, ["--a.b"])
