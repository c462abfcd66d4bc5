"""Broken and hostile input: values, files that hold them, and what a program may do with them."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from typer.testing import CliRunner

from ultramem.cli import app
from ultramem.errors import LONGEST_MESSAGE, UltraMemError

# As they stand in a file or on a command line: beyond a machine's numbers, at its borders, and no numbers.
NUMBERS = [
    *("0", "-0", "-1", "1", "2", "1.5", "true", "null", "NaN", "Infinity", "-Infinity", ".inf", ".nan", "-.inf", "nan"),
    *("inf", "0x10", "1_000", "\u0661", "1e3", "1e30", "1e200", "1e308", "1e999", "-1e999", "5e-324", "-0.0", "1e-400"),
    *(str(2**power + more) for power in (31, 32, 63, 64, 70) for more in (-1, 0, 1)),
    str(-(2**63) - 1),
    "9" * 400,
    "9" * 4000,
    "9" * 5000,
]
numbers = st.sampled_from(NUMBERS)
texts = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", "\0", "\ud800", "\ufeff", "a\nb", "../../x", "/etc/passwd", "<b>", "$x^", "[red]", "x" * 10**5]
    ),
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    texts,
    st.sampled_from([2**63, 2**70, 10**400, -(10**400), 1e308, 5e-324, -0.0, float("nan"), float("inf")]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
nested = st.sampled_from(["[" * 10**5, '{"a":' * 10**5, "[" * 50 + "]" * 50, "- " * 500 + "x", "? " * 500])


def changed(content: Any) -> SearchStrategy[Any]:
    """JSON content in which one value at any depth is another, or is missing."""

    def change(place: tuple[Any, ...], value: Any, drop: bool) -> Any:
        if not place:
            return value
        result = copy.deepcopy(content)
        *parents, last = place
        inner = result
        for key in parents:
            inner = inner[key]
        if drop:
            del inner[last]
        else:
            inner[last] = value
        return result

    return st.builds(change, st.sampled_from(list(_places(content))), values, st.booleans())


def _places(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    if isinstance(content, dict | list):
        for key in content if isinstance(content, dict) else range(len(content)):
            yield from _places(content[key], (*place, key))


def damaged(text: str) -> SearchStrategy[bytes]:
    """A file's content in which bytes are other ones, or a number is a strange one; or something else altogether."""
    content = text.encode()
    spots = st.integers(0, len(content))
    spans = [match.span() for match in re.finditer(rb"-?[0-9][0-9.e+-]*", content)] or [(0, 0)]

    def spliced(first: int, second: int, middle: bytes) -> bytes:
        return content[: min(first, second)] + middle + content[max(first, second) :]

    return st.one_of(
        st.builds(spliced, spots, spots, st.binary(max_size=8)),
        st.builds(spliced, spots, spots, st.just(b"")),
        st.builds(lambda at: content[:at] + content[at:] * 2, spots),
        st.builds(lambda span, number: spliced(*span, number.encode()), st.sampled_from(spans), numbers),
        st.builds(lambda at: content[:at], spots),
        st.binary(max_size=50),
        nested.map(str.encode),
        st.sampled_from(
            [b"", b"\xef\xbb\xbf" + content, content + content, b"null", b"[]", b"{}", b"0", b'"x"', b"\0"]
        ),
        st.sampled_from([text.encode("utf-16"), b"9" * 5000]),
    )


def json_files(content: Any) -> SearchStrategy[bytes]:
    """A JSON file that is not as it was written."""
    text = json.dumps(content)
    return damaged(text) | changed(content).map(json.dumps).map(str.encode)


@contextmanager
def allowed() -> Iterator[None]:
    """The body works, or raises an error of one line of which a person can read all."""
    try:
        yield
    except UltraMemError as error:
        assert_plain(str(error))


def assert_plain(message: str) -> None:
    """The text is one line, and not too long to read."""
    assert message.splitlines() == [message]
    assert len(message) <= LONGEST_MESSAGE + 5


def call(*arguments: str) -> None:
    """Run the command, which works or says in one line why not."""
    result = CliRunner().invoke(app, arguments, standalone_mode=True)
    if isinstance(result.exception, UltraMemError):
        assert_plain(str(result.exception))
    elif result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    else:
        assert result.exit_code in (0, 1, 2)
