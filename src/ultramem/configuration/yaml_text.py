"""YAML 1.2, with errors that name the line."""

from __future__ import annotations

import re
from typing import Any

import yaml

from ultramem.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Reads scalars as in YAML 1.2: 1e-4 is a number; 2:5, yes and no are strings."""

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
    """Parse YAML.

    Args:
        text: YAML text.
        source: file or option that the text is from, for errors.

    Raises:
        ConfigError: the text is not valid YAML; the error names the line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise ConfigError(f"{source}{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {str(error).splitlines()[0]}") from error


def dump_yaml(content: Any) -> str:
    """YAML text of nested mappings, lists, numbers and strings, in the order of the mappings."""
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
