"""The unigram model against a count by hand."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ultramem.errors import UltraMemError
from ultramem.evaluation import unigram


def test_add_one_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unigram, "CHUNK_TOKENS", 7)  # files are read in several pieces
    random, vocab_size = np.random.default_rng(0), 20
    arrays = [random.zipf(1.5, size) % vocab_size for size in (50, 33, 40)]
    paths = [tmp_path / f"{i}.npy" for i in range(3)]
    for path, tokens in zip(paths, arrays, strict=True):
        tokens.astype("<u4").tofile(path)
    train, heldout = [*arrays[0].tolist(), *arrays[1].tolist()], arrays[2].tolist()
    counts = Counter(train)
    expected = -sum(math.log((counts[token] + 1) / (len(train) + vocab_size)) for token in heldout) / len(heldout)
    assert any(counts[token] == 0 for token in heldout)
    assert unigram.unigram_loss(paths[:2], paths[2:], "uint32", vocab_size) == pytest.approx(expected, rel=1e-12)


def test_an_id_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "0.npy"
    np.array([1, 5], dtype="<u2").tofile(path)
    with pytest.raises(UltraMemError, match="has id 5, but the vocabulary has 5 tokens"):
        unigram.count_tokens([path], "uint16", 5)
