"""Near-duplicates against similarities counted in full."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from ultramem.data.documents import Document, find_sources, read_documents
from ultramem.data.near_duplicates import near_duplicates
from ultramem.data.tokenize import TokenizeConfig, tokenize
from ultramem.errors import ConfigError


def words(count: int, seed: int) -> list[str]:
    choose = random.Random(seed)
    return ["".join(choose.choices("abcdefgh", k=6)) for _ in range(count)]


def changed(text: list[str], places: int, seed: int) -> list[str]:
    """With so many words replaced, evenly spread."""
    new = words(places, seed)
    result = list(text)
    for number, word in enumerate(new):
        result[number * len(text) // places] = word
    return result


def jaccard(first: str, second: str) -> float:
    sets = [{tuple(text.split()[i : i + 5]) for i in range(len(text.split()) - 4)} for text in (first, second)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def documents(texts: list[str], directory: Path) -> list[Document]:
    path = directory / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [record for record in read_documents(find_sources([path])) if isinstance(record, Document)]


@pytest.mark.parametrize("processes", [1, 2])
def test_found_by_their_similarity(tmp_path: Path, processes: int) -> None:
    originals = [words(400, seed) for seed in range(12)]
    near = [changed(text, 8, 100 + number) for number, text in enumerate(originals)]
    far = [changed(text, 60, 200 + number) for number, text in enumerate(originals)]
    texts = [" ".join(text) for group in (originals, near, far) for text in group]
    assert all(jaccard(texts[n], texts[12 + n]) > 0.8 for n in range(12))
    assert all(jaccard(texts[n], texts[24 + n]) < 0.45 for n in range(12))
    assert near_duplicates(documents(texts, tmp_path), 0.65, processes) == set(range(12, 24))


def test_white_space_and_short_texts(tmp_path: Path) -> None:
    texts = ["def f(x):\n    return x", "def f(x): return (x)", "short", "shorter", "short", "?", "!"]
    assert near_duplicates(documents(texts, tmp_path), 0.9, 1) == {1, 4, 6}
    assert near_duplicates(documents(texts, tmp_path), 1.0, 1) == {1, 4, 6}


def test_a_chain_keeps_what_resembles_only_left_out_ones(tmp_path: Path) -> None:
    """The last resembles the second, which is left out, but not the first."""
    first = words(400, 0)
    second = changed(first, 5, 1)
    third = [*second[:-50], *words(50, 2)]
    texts = [" ".join(text) for text in (first, second, third)]
    assert jaccard(texts[0], texts[1]) > 0.85
    assert jaccard(texts[1], texts[2]) > 0.75 > 0.7 > jaccard(texts[0], texts[2])
    assert near_duplicates(documents(texts, tmp_path), 0.72, 1) == {1}
    assert near_duplicates(documents(texts[1:], tmp_path), 0.72, 1) == {1}


@pytest.mark.parametrize("processes", [1, 2])
def test_left_out_of_the_token_files(tmp_path: Path, processes: int) -> None:
    texts = [" ".join(words(100, seed)) for seed in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, *texts[:10]]))
    options = {"sources": (tmp_path / "a.jsonl",), "train_bpe": 300, "processes": processes, "heldout": 0.2}
    whole = tokenize(TokenizeConfig(output=tmp_path / "whole", **options))  # type: ignore[arg-type]
    without = tokenize(TokenizeConfig(output=tmp_path / "without", near_duplicates=0.7, **options))  # type: ignore[arg-type]
    assert sum(split.documents for split in whole.splits.values()) == 40
    assert sum(split.documents for split in without.splits.values()) == 30
    assert (whole.near_duplicates, without.near_duplicates) == (0, 10)
    assert sum(split.bytes for split in without.splits.values()) == sum(map(len, texts))


@pytest.mark.parametrize("similarity", [0.0, -1.0, 1.5])
def test_a_similarity_that_cannot_be(similarity: float) -> None:
    with pytest.raises(ConfigError, match=f"near_duplicates={similarity}: must be"):
        TokenizeConfig(sources=(Path("a"),), output=Path("b"), train_bpe=300, near_duplicates=similarity)
