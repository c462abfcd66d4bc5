"""Scalars of configuration files, and what is said about mistakes in the syntax."""

import pytest

from ultramem.configuration.yaml_text import parse_yaml
from ultramem.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3E5", 3e5),
        ("-.5", -0.5),
        ("5.", 5.0),
        ("12", 12),
        ("1_000", 1000),
        ("0", 0),
        ("010", 10.0),
        (".inf", float("inf")),
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("on", "on"),
        ("null", None),
        ("~", None),
        ("", None),
        ("2:5", "2:5"),
        ("2:5/6:9", "2:5/6:9"),
        ("1e", "1e"),
        ("2024-01-01", "2024-01-01"),
        ("'12'", "12"),
        ("[0.9, 0.95]", [0.9, 0.95]),
        ("{a: 1}", {"a": 1}),
    ],
)
def test_scalars_as_in_yaml_1_2(text, value):
    parsed = parse_yaml(text, "here")
    assert parsed == value
    assert type(parsed) is type(value)


def test_syntax_error_names_the_line():
    with pytest.raises(ConfigError, match=r"^run.yaml, line 4: not valid YAML: expected ','"):
        parse_yaml("a: 1\nb:\n  [1, 2\nc: 3\n", "run.yaml")
    with pytest.raises(ConfigError, match=r"^run.yaml, line 1: not valid YAML: tags"):
        parse_yaml("!!python/object/apply:os.system [ls]", "run.yaml")
