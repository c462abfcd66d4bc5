"""JSON of any kind is read as by Python's reader, or refused with its path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostile import allowed, json_files
from ultramem.errors import UltraMemError
from ultramem.files.checksums import Checksums
from ultramem.files.json_files import parse_json, path_inside, read_json, read_json_object

of_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
CONTENT = {"a": [1, 2.5, {"b": None}], "ä": "\U0001f600"}
CHECKSUMS = {"algorithm": "crc32", "files": {"a/b": [[3, "0000000f"]], "c": [[1, "0"], [2, "1"]]}}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("json") / "checksums.json"


@given(of_json, st.booleans())
def test_what_is_written_is_read(content: Any, ascii_only: bool) -> None:
    assert parse_json(json.dumps(content, ensure_ascii=ascii_only).encode()) == content


@given(content=json_files(CONTENT))
def test_any_file(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert isinstance(read_json_object(path), dict)
    with allowed():
        read = read_json(path, "remove it")
        json.dumps(read, ensure_ascii=False).encode()
        assert json.dumps(read) == json.dumps(json.loads(content))


@given(content=json_files(CHECKSUMS))
def test_any_checksums(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with allowed():
        Checksums.load(path.parent)
        checksums = Checksums.load(path.parent)
        assert checksums is not None
        checksums.check()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": 1, "a": 2}', "'a' is in it twice"),
        (b"[" * 10**5, "it is nested too deeply"),
        (b"9" * 5000, "it has a whole number of more than 64 bits"),
        (str(2**63).encode(), "it has a whole number of more than 64 bits"),
        (b'"\\ud800"', "'utf-8' codec can't encode"),
        (b"\xef\xbb\xbf{}", "Unexpected UTF-8 BOM"),
        ("{}".encode("utf-16"), "'utf-8' codec can't decode"),
        (b'{"a": ', "Expecting value"),
        (b"", "Expecting value"),
    ],
)
def test_what_is_refused(path: Path, content: bytes, reason: str) -> None:
    path.write_bytes(content)
    with pytest.raises(UltraMemError, match=rf"^{path} is damaged \({reason}.*\); remove it$"):
        read_json(path, "remove it")
    assert read_json_object(path) == {}


def test_a_pair_of_surrogates_is_a_character() -> None:
    assert parse_json(b'"\\ud83d\\ude00"') == "\U0001f600"


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/../../b", "/etc/passwd", "a/..", "a\0b", "x" * 256])
def test_paths_that_lead_out(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is no path in this directory"):
        path_inside(tmp_path, name)


def test_paths_inside(tmp_path: Path) -> None:
    assert path_inside(tmp_path, "a/b.npy") == tmp_path / "a" / "b.npy"
