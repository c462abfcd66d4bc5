"""YAML of any kind is read as it was written, or refused in one line with the place."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hostile import allowed, damaged, nested, numbers, texts, values
from ultramem.configuration.decoding import decode, dotted_keys
from ultramem.configuration.overrides import apply_overrides
from ultramem.configuration.yaml_text import DEEPEST, LARGEST_TEXT, MOST_VALUES, dump_yaml, parse_yaml
from ultramem.errors import ConfigError
from ultramem.runs.config import RunConfig

VALID = """\
model:
  d_model: 32
  num_blocks: 2
  num_heads: 2
  feed_forward_size: 48
  vocab_size: 384
  memory: {num_keys: 8, key_dim: 8, value_dim: 8, top_k: 4, share_ratio: 0.5, insertion: "0:1"}
data: {directory: tokens, sequence_length: 16}
trainer:
  directory: run
  batch_size: 64
  tokens: 1e3
  evaluate_tasks: [table3, "memory"]
optimizer: {learning_rate: 4e-4, betas: [0.9, 0.95], eps: 1e-8}
schedule: {kind: wsd}
"""
KEYS = [*dotted_keys(RunConfig)]
printable = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"], exclude_characters="\ufeff"), max_size=10)
of_yaml = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | printable,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(printable.filter(lambda key: key.isprintable() and key != "<<"), inner)
    ),
    max_leaves=10,
)


@given(of_yaml)
def test_what_is_written_is_read(content: Any) -> None:
    assert parse_yaml(dump_yaml(content), "here") == content


@given(st.text() | texts | nested | st.text(st.sampled_from("[]{}:,-?&*!|>'\"%@`#~ \n\t\\ux01.eE_<")))
@example('"\\U00110000"')
@example("%YAML " + "1" * 5000 + ".1\n--- a")
@example("1__0")
def test_any_text(text: str) -> None:
    with allowed():
        parse_yaml(text, "here")


@given(damaged(VALID))
@example(VALID.encode())
def test_a_run_configuration(content: bytes) -> None:
    with allowed():
        decode(RunConfig, parse_yaml(content.decode("utf-8", errors="replace"), "here"), KEYS)


@given(st.sampled_from(KEYS) | texts, numbers | texts | of_yaml.map(dump_yaml))
@example("trainer.steps", "true")
@example("optimizer.eps", ".inf")
@example("model.memory.share_ratio", "5e-324")
@example("model.memory.sharing", "block")
@example("x" * 10**5, "1")
def test_an_override(key: str, value: str) -> None:
    content = parse_yaml(VALID, "here")
    with allowed():
        apply_overrides(content, [f"--{key}={value}"])
        decode(RunConfig, content, KEYS)


@given(st.sampled_from(KEYS), values)
@example("model", {"\x1e": None})
def test_a_value_of_python(key: str, value: Any) -> None:
    content = parse_yaml(VALID, "here")
    *sections, name = key.split(".")
    inner = content
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[name] = value
    with allowed():
        decode(RunConfig, content, KEYS)


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("a: 1\nb: 2\na: 3", 3, "the key a is already in line 1"),
        ("a:\n  b: 1\n  b: 1", 3, "the key b is already in line 2"),
        ("a: !!python/object/apply:os.system [ls]", 1, "tags"),
        ("a: 1\nb: !!binary aGk=", 2, "tags"),
        ("a: ! b", 1, "tags"),
        ("a: &x 1", 1, "anchors"),
        ("a: *x", 1, "anchors"),
        ("a: &x [*x]", 1, "anchors"),
        ("a: {b: 1}\nc: {<<: {d: 1}}", 2, "a key must be text"),
        ("3: x", 1, "a key must be text"),
        ("[a]: x", 1, "a key must be text"),
        ("true: x", 1, "a key must be text"),
        ('"a\\nb": x', 1, "a key must be text"),
        ("[" * (DEEPEST + 1), 1, f"sections and lists are nested more than {DEEPEST} deep"),
        ("- " * (DEEPEST + 1), 1, f"sections and lists are nested more than {DEEPEST} deep"),
        ("- a\n" * MOST_VALUES, MOST_VALUES, f"there are more than {MOST_VALUES} keys and values"),
        ("a: 1\n---\nb: 2", 2, "found another document"),
        ("a: 1\nb: x\0", 2, "special characters are not allowed"),
        ('a: "\\0"', 1, "control characters"),
        ('a: "\\ud800"', 1, "control characters"),
        (f"a: 1\nb: {2**63}", 2, "a whole number has at most 64 bits"),
        (f"a: -{'9' * 5000}", 1, "a whole number has at most 64 bits"),
        ("a: 1e999", 1, "a number is at most 1.8e308"),
        ("a: b: c", 1, "mapping values are not allowed here"),
    ],
)
def test_what_is_refused(text: str, line: int, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"^run.yaml, line {line}: not valid YAML: {re.escape(problem)}"):
        parse_yaml(text, "run.yaml")


def test_a_large_document() -> None:
    with pytest.raises(ConfigError, match=r"^run.yaml: is larger than 1048576 bytes"):
        parse_yaml(" " * (LARGEST_TEXT + 1), "run.yaml")
