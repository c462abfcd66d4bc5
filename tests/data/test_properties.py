"""Manifests and tokenizers of any content are used, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hostile import allowed, changed, damaged, json_files
from tiny_run import byte_level_tokenizer, write_data
from ultramem.configuration.field_types import check_types
from ultramem.data.documents import parse_size
from ultramem.data.token_files import load_manifest
from ultramem.data.tokenizers import Encoder, load_tokenizer
from ultramem.errors import UltraMemError

TOKENIZER = json.loads(byte_level_tokenizer().to_str())
MODELS: list[Any] = [
    {"type": "BPE", "vocab": {}, "merges": []},
    {"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "x"},
    {"type": "BPE", "vocab": {"a": 0, "##b": 1, "ab": 2}, "merges": ["a ##b"], "continuing_subword_prefix": "####"},
    {"type": "BPE", "vocab": {"a": 2**32 - 1, "<|endoftext|>": 0}, "merges": []},
    {"type": "BPE", "vocab": {"a": 2**31, "<|endoftext|>": 0}, "merges": []},
    {"type": "BPE", "vocab": {"a": 2**32}, "merges": []},
    {"type": "WordLevel", "vocab": {"<|endoftext|>": 0}, "unk_token": "x"},
    {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "x", "continuing_subword_prefix": "##"},
    {"type": "Unigram", "vocab": [["", 0.0]], "unk_id": 0},
    {"type": "Unigram", "vocab": [], "unk_id": 0},
]
PARTS: dict[str, Any] = {
    "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "q", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    },
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
    "decoder": {"type": "WordPiece", "prefix": "", "cleanup": True},
    "truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 5},
}

PADDING = {
    "strategy": {"Fixed": 2**40},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 1,
    "pad_type_id": 0,
    "pad_token": "<|padding|>",
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "tokens"
    splits = {"train": [np.arange(100, dtype=np.uint16)], "heldout": [np.arange(50, dtype=np.uint16)]}
    write_data(path, splits, {"train": 300, "heldout": 150})
    return path


@pytest.fixture(scope="module")
def manifest(directory: Path) -> Any:
    return json.loads((directory / "manifest.json").read_text())


@given(st.data())
def test_any_manifest(directory: Path, manifest: Any, data: st.DataObject) -> None:
    (directory / "manifest.json").write_bytes(data.draw(json_files(manifest)))
    with allowed():
        loaded = load_manifest(directory)
        check_types(loaded)
        for split in loaded.splits.values():
            assert all(directory in path.parents for path in split.paths)
            assert all(file.tokens > 0 for file in split.files)


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (["dtype"], "int64", "dtype='int64': must be one of uint16, uint32"),
        (["vocab_size"], "300", "vocab_size='300': must be a whole number"),
        (["vocab_size"], 2**16 + 1, "vocab_size=65537: must be at least 1 and at most 65536"),
        (["eos_token_id"], 258, "eos_token_id=258: must be at least 0 and below 258"),
        (["pad_token_id"], -1, "pad_token_id=-1: must be at least 0 and below 258"),
        (["seed"], 2**63, "it has a whole number of more than 64 bits"),
        (["seed"], True, "seed=True: must be a whole number"),
        (["sources"], [], "sources=[]: must be a section of keys and values"),
        (["skipped_examples"], [1], "skipped_examples[0]=1: must be text"),
        (["splits"], {"train": {"files": []}}, "must be train and heldout"),
        (["splits", "train", "files", 0, "tokens"], 100.0, "tokens=100.0: must be a whole number"),
        (["splits", "train", "files", 0, "tokens"], 0, "tokens=0: must be at least 1"),
        (["splits", "train", "files", 0, "bytes"], -1, "bytes=-1: must be at least 0"),
        (["splits", "train", "files", 0, "path"], "../../x", "'../../x' is no path in this directory"),
        (["splits", "train", "files", 0, "path"], "/etc/passwd", "'/etc/passwd' is no path in this directory"),
        (["splits", "train", "files", 0], {"path": "train/part-00000.npy"}, "'documents' is missing"),
    ],
)
def test_what_is_refused(directory: Path, manifest: Any, place: list[Any], value: Any, reason: str) -> None:
    content = json.loads(json.dumps(manifest))
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (directory / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UltraMemError) as error:
        load_manifest(directory)
    message = str(error.value)
    assert message.startswith(f"{directory}/manifest.json is damaged (")
    assert reason in message
    assert message.endswith("; tokenize again with --overwrite")


@given(
    content=json_files(TOKENIZER)
    | st.sampled_from(MODELS).map(
        lambda model: json.dumps(TOKENIZER | {"model": model, "pre_tokenizer": None}).encode()
    )
    | changed(TOKENIZER | PARTS).map(lambda content: json.dumps(content).encode())
)
@example(json.dumps(TOKENIZER | {"normalizer": PARTS["normalizer"]}).encode())
@example(json.dumps(TOKENIZER | {"post_processor": PARTS["post_processor"]}).encode())
@example(json.dumps(TOKENIZER | {"model": MODELS[4], "pre_tokenizer": None}).encode())
@example(json.dumps(TOKENIZER | {"padding": PADDING}).encode())
def test_any_tokenizer(directory: Path, content: bytes) -> None:
    file = directory / "other.json"
    file.write_bytes(content)
    with allowed():
        tokenizer = load_tokenizer(str(file), eos_id=0)
        assert all(0 <= token < tokenizer.vocab_size for token in tokenizer.encode(["ab é 😀"])[0].ids)
        Encoder(tokenizer.tokenizer.to_str(), 0, tokenizer.dtype)("ab é 😀")


@given(content=json_files({"eos_token": {"content": "<|endoftext|>"}, "pad_token": "<|padding|>"}))
def test_any_settings_beside_a_tokenizer(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    directory = tmp_path_factory.getbasetemp()
    byte_level_tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_bytes(content)
    with allowed():
        assert load_tokenizer(str(directory)).eos_token_id in range(258)


@given(st.text() | st.from_regex(r"[0-9.]{1,400}( ?[kmgtKMGT]i?)?[bB]?", fullmatch=True))
def test_any_size(text: str) -> None:
    with allowed():
        assert 0 < parse_size(text) < 2**63


@given(damaged("30 MB").map(lambda content: content.decode(errors="replace")))
def test_any_damaged_size(text: str) -> None:
    with allowed():
        parse_size(text)
