"""Documents against files written by other means, and every kind of broken record."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from ultramem.data import documents
from ultramem.data.documents import BrokenRecordError, Document, find_sources, parse_size, read_documents
from ultramem.errors import ConfigError, UltraMemError

TEXTS = ["first", "two\r\nlines\n", "Grüße, 世界 🌍", " "]


def read(*paths: Path, **options: str) -> list[Document | BrokenRecordError]:
    return list(read_documents(find_sources(paths), **options))


def texts(*paths: Path, **options: str) -> list[str]:
    found = read(*paths, **options)
    assert all(isinstance(record, Document) for record in found)
    return [record.text for record in found if isinstance(record, Document)]


def json_lines(values: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({field: value}) + "\n" for value in values).encode()


@pytest.mark.parametrize(
    ("size", "expected"),
    [("17", 17), ("2MB", 2_000_000), ("500MiB", 524_288_000), ("1.5kb", 1500), ("3 g", 3 * 10**9), ("1KiB", 1024)],
)
def test_sizes(size: str, expected: int) -> None:
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "0", "-3", "2XB", "MB", "1e9", "2MBs"])
def test_bad_sizes_are_named(size: str) -> None:
    with pytest.raises(ConfigError, match=f"max_size={size!r}: must be"):
        parse_size(size)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.jsonl.gz", "a.json.zst"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    data = json_lines(TEXTS)
    compress = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(compress(data[:20]) + compress(data[20:]))  # several frames, as pigz writes
    assert texts(tmp_path / name) == TEXTS


def test_json_record_keeps_id_line_and_size(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"id": "x7", "body": "é"}\n\n{"body": "b"}\n', encoding="utf-8")
    first, second = read(file, text_field="body")
    assert isinstance(first, Document)
    assert isinstance(second, Document)
    assert (first.name, first.location, first.num_bytes, first.source) == ("x7", 1, 2, str(file))
    assert (second.name, second.location) == (f"{file}:3", 3)
    assert second.position == file.stat().st_size


def test_parquet(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    table = pa.table({"number": range(4), "content": TEXTS, "id": ["a", "b", "c", "d"]})
    pa.parquet.write_table(table, file, row_group_size=3)
    found = read(file, text_field="content")
    assert [(r.text, r.name, r.location) for r in found if isinstance(r, Document)] == [
        (text, name, row) for row, (text, name) in enumerate(zip(TEXTS, "abcd", strict=True), start=1)
    ]


@pytest.mark.parametrize("name", ["a.py", "a.txt", "a", "a.md.gz", "a.txt.zst"])
def test_a_text_file_is_a_document_byte_for_byte(tmp_path: Path, name: str) -> None:
    compress = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(compress("".join(TEXTS).encode()))
    assert texts(tmp_path / name) == ["".join(TEXTS)]


def test_long_txt_is_cut_at_line_ends_and_long_source_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LONGEST_TEXT", 100)
    content = "".join(f"line {number} ü\n" for number in range(200)) + "x" * 250
    for name in ("a.txt", "a.py"):
        (tmp_path / name).write_text(content, encoding="utf-8")
    pieces = texts(tmp_path / "a.txt")
    assert "".join(pieces) == content
    assert all(len(piece) <= 100 for piece in pieces)
    assert all(piece.endswith("\n") for piece in pieces if "line" in piece)
    assert texts(tmp_path / "a.py") == [content]


@pytest.mark.parametrize("block", [3, 7, 2**20])
def test_separator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(documents, "LONGEST_TEXT", 2**20)
    monkeypatch.setattr(documents, "BLOCK", block)
    (tmp_path / "a.txt").write_text("one\n<|end|>\n\ntwo\nlines\n<|end|>\n<|end|>three\n<|end|>\n")
    assert texts(tmp_path / "a.txt", separator="<|end|>") == ["one", "two\nlines", "three"]


def test_walk_is_sorted_and_leaves_out_hidden_and_excluded(tmp_path: Path) -> None:
    for name in ("b/z.py", "b/a.py", "a.py", "c/tests/t.py", "x.txt", ".git/h.py", "b/.h.py", "b/n.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "again.py").symlink_to(tmp_path / "a.py")

    def names(**options: list[str]) -> list[str]:
        return [f.path.relative_to(tmp_path).as_posix() for f in find_sources([tmp_path, tmp_path / "a.py"], **options)]

    assert names() == ["x.txt", "a.py"]
    assert names(include=["*.py"]) == ["a.py", "b/a.py", "b/z.py", "c/tests/t.py"]
    assert names(include=["*.py"], exclude=["*/tests/*", "z.py"]) == ["a.py", "b/a.py"]
    assert names(include=["b/*"], exclude=["a.py"]) == ["b/n.pyc", "b/z.py"]


def test_missing_source_and_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(UltraMemError, match=r"nowhere does not exist"):
        find_sources([tmp_path / "nowhere"])
    with pytest.raises(UltraMemError, match="--include"):
        find_sources([tmp_path])
    with pytest.raises(UltraMemError, match=r"^/ is the whole file system; give files and directories in it"):
        find_sources([Path("/")])
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UltraMemError, match=f"^{path} is neither a file nor a directory; "):
            find_sources([path])


@pytest.mark.parametrize(
    ("name", "content", "place", "reason"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', ":2", "not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', ":2", "no field 'text'"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', ":2", "type int, not a string"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', ":2", "not a JSON object"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', ":2", "not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', ":2", "not valid Unicode"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ""}\n', ":2", "empty"),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000 + b"\n", ":2", "not valid JSON"),
        ("a.py", b"fine\nfine\nbad \xe9\n", ":3", "not UTF-8"),
        ("a.py", b"fine\ncut off \xc3", ":2", "not UTF-8"),
        ("a.py", b"", "", "empty"),
        ("a.txt", b"", "", "empty"),
        ("a.txt.gz", b"not gzip", "", "cannot be read"),
        ("a.parquet", b"not parquet", "", "cannot be read"),
    ],
)
def test_broken_record_is_named(tmp_path: Path, name: str, content: bytes, place: str, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    broken = read(tmp_path / name)[-1]
    assert isinstance(broken, BrokenRecordError)
    assert f"{tmp_path / name}{place}: " in str(broken).replace(":1: cannot", ": cannot")
    assert reason in str(broken)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_stream_is_broken_from_its_last_whole_line_on(tmp_path: Path, suffix: str) -> None:
    values = [f"document {number} {number**9}" for number in range(20_000)]
    compress = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    data = compress(json_lines(values))
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(data[:-4])
    *whole, broken = read(file)
    assert [record.text for record in whole if isinstance(record, Document)] == values[: len(whole)]
    assert 0 < len(whole) < len(values)
    assert isinstance(broken, BrokenRecordError)
    assert f":{len(whole) + 1}: cannot be read from this line on" in str(broken)


def test_broken_parquet_values(tmp_path: Path) -> None:
    undecodable = pa.array([b"a", b"\xff", b"b"]).view(pa.string())
    for name, column in {"null": pa.array(["a", None, "b"]), "bytes": undecodable, "int": pa.array([1, 2])}.items():
        pa.parquet.write_table(pa.table({"text": column}), tmp_path / f"{name}.parquet")
    kept, broken, other = read(tmp_path / "null.parquet")
    assert (kept.text, other.text) == ("a", "b")  # type: ignore[union-attr]
    assert "null.parquet:2: the text is of type NoneType" in str(broken)
    assert "bytes.parquet:2: not UTF-8" in str(read(tmp_path / "bytes.parquet")[1])
    assert "int.parquet:1: the text is of type int" in str(read(tmp_path / "int.parquet")[0])
    assert "columns: text" in str(read(tmp_path / "int.parquet", text_field="content")[0])


def test_reading_goes_on_after_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"no")
    (tmp_path / "b.txt").write_text("fine")
    broken, document = read(tmp_path)
    assert isinstance(broken, BrokenRecordError)
    assert isinstance(document, Document)
    assert document.text == "fine"
