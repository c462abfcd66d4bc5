"""YAML 1.2 without what a configuration does not need; errors name the line."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import yaml

from ultramem.configuration.field_types import is_64_bit
from ultramem.errors import ConfigError, first_line, system_reason
from ultramem.files.whole_files import read_bytes

LARGEST_TEXT = 2**20  # in bytes; a run's configuration has one or two thousand
MOST_VALUES = 20_000  # keys count too; more take seconds
DEEPEST = 20  # sections and lists within each other; a run's configuration has four
_TEXT = "tag:yaml.org,2002:str"


class _Loader(yaml.SafeLoader):
    """Reads scalars as in YAML 1.2: 1e-4 is a number; 2:5, yes and no are strings.

    Refuses what could be read in two ways, costs time or runs code: keys that are not text or come twice, tags,
    anchors and aliases, deep nesting, control characters, and numbers beyond 64 bits.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012
    values = depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if event.anchor is not None:
            raise _refused(event, "anchors (&) and aliases (*) are not supported; write the value out, or quote it")
        if getattr(event, "tag", None) is not None:
            raise _refused(event, "tags (!) are not supported; leave it out, or quote the value")
        if isinstance(event, yaml.ScalarEvent) and yaml.reader.Reader.NON_PRINTABLE.search(event.value):
            raise _refused(event, "control characters are not supported; leave them out")
        if self.depth == DEEPEST:
            raise _refused(event, f"sections and lists are nested more than {DEEPEST} deep; remove some")
        if self.values == MOST_VALUES:
            raise _refused(event, f"there are more than {MOST_VALUES} keys and values; remove some")
        self.values += 1
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag != _TEXT or key.value == "<<" or not key.value.isprintable():
                raise _refused(key, "a key must be text on one line and not <<; quote it if it looks like another type")
            if key.value in lines:
                raise _refused(key, f"the key {key.value[:100]} is already in line {lines[key.value]}; leave one out")
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > 30 or not is_64_bit(number := int(node.value.replace("_", ""))):
            raise _refused(node, "a whole number has at most 64 bits; write a smaller one")
        return number

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        number = super().construct_yaml_float(node)
        if math.isinf(number) and not node.value.lower().endswith(".inf"):
            raise _refused(node, "a number is at most 1.8e308; write a smaller one")
        return number


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", [*"-+0123456789"]),
    ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", [*"-+."]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def _refused(place: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """Parse a YAML file.

    Raises:
        ConfigError: the file cannot be read or is not valid.
    """
    try:
        text = read_bytes(Path(path), LARGEST_TEXT + 1).decode("utf-8")
    except (OSError, ValueError) as error:  # the latter if it is not UTF-8, or a name of a file that no file can have
        reason = system_reason(error) if isinstance(error, OSError) else first_line(error)
        raise ConfigError(f"{path}: cannot be read ({reason}); check the path") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML.

    Args:
        text: YAML text.
        source: file or option that the text is from, for errors.

    Raises:
        ConfigError: the text is not valid YAML, or more than a configuration needs; the error names the line.
    """
    if len(text) > LARGEST_TEXT:
        raise ConfigError(f"{source}: is larger than {LARGEST_TEXT} bytes; give a run's configuration")
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{source}, line {line}: not valid YAML: {error.reason}; leave them out") from error
    except yaml.MarkedYAMLError as error:
        line = getattr(error.problem_mark, "line", 0) + 1  # PyYAML always has a mark
        problem = str(error.problem).removeprefix("but ")
        raise ConfigError(f"{source}, line {line}: not valid YAML: {problem}") from error
    except ValueError as error:  # of an escape or a directive with a number out of range
        raise ConfigError(f"{source}, line {loader.line + 1}: not valid YAML: {error}") from error


def dump_yaml(content: Any) -> str:
    """YAML text of nested mappings, lists, numbers and strings, in the order of the mappings."""
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
